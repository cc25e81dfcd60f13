"""Metrics that alerts and dashboards of the chart ask Prometheus for, against those that the product has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from support.chart import Rendered, where

from serve.telemetry.declarations import DECLARATIONS, Kind

OURS = re.compile(r"\b(?:ray_)?tandem_[a-z0-9_]+")
SUFFIXES = {Kind.COUNTER: ("",), Kind.GAUGE: ("",), Kind.HISTOGRAM: ("_bucket", "_sum", "_count")}
EXPORTED = {f"ray_{each.name}{suffix}" for each in DECLARATIONS for suffix in SUFFIXES[each.kind]}
"""Names under which Ray's agents give Prometheus our metrics."""


def unknown_metrics(rendered: Rendered) -> list[str]:
    """An alert on a metric that does not exist never fires, and nobody sees that."""
    return [
        f"{place}: there is no metric {name}"
        for place, expression in expressions(rendered)
        for name in OURS.findall(expression)
        if name not in EXPORTED
    ]


def expressions(rendered: Rendered) -> Iterator[tuple[str, str]]:
    """(where, PromQL) of everything that is asked."""
    for rules in rendered.of("PrometheusRule"):
        for group in rules["spec"]["groups"]:
            for rule in group["rules"]:
                yield f"{where(rules)} {rule.get('alert') or rule.get('record')}", rule["expr"]
    for config in rendered.of("ConfigMap"):
        for name, text in config.get("data", {}).items():
            if name.endswith(".json"):
                yield from ((f"{where(config)} {name}", each) for each in _asked(json.loads(text)))


def _asked(node: Any) -> Iterator[str]:
    """Every expression of a dashboard: of its panels, and of its variables, which Grafana calls queries."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name in ("expr", "query", "definition") and isinstance(value, str):
                yield value
            else:
                yield from _asked(value)
    elif isinstance(node, list):
        for each in node:
            yield from _asked(each)
