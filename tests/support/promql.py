"""What rules and dashboards ask Prometheus for, against what there is: metrics, their labels, and the labels' values.

An expression over a metric that does not exist is no error to Prometheus: the alert never fires, the panel stays empty.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest

from serve.domain.jobs import JobState
from serve.domain.text import Sign, Tier
from serve.telemetry.declarations import DECLARATIONS, Kind
from serve.webhooks.deliverer import Outcome

TARGET = {"namespace", "release", "pod", "container", "instance", "job", "ray_cluster", "ray_group"}
"""Labels of a scrape: those that templates/podmonitor.yaml sets, and Prometheus' own."""
SUFFIXES = {Kind.COUNTER: ("",), Kind.GAUGE: ("",), Kind.HISTOGRAM: ("_bucket", "_count")}
"""A histogram's `_sum` is missing: Ray makes it from the middles of the buckets, and no average comes of it."""
OURS = {
    f"ray_{each.name}{suffix}": {*each.labels, *each.process, *({"le"} if suffix == "_bucket" else ())}
    for each in DECLARATIONS
    for suffix in SUFFIXES[each.kind]
}
SERVE = {"application", "deployment", "replica"}
RAYS: Mapping[str, set[str]] = {
    # Ray Serve's proxies and controller
    "ray_serve_num_http_requests_total": {"route", "method", "application", "status_code"},
    "ray_serve_http_request_latency_ms_bucket": {"route", "method", "application", "status_code", "le"},
    "ray_serve_deployment_replica_healthy": SERVE,
    "ray_serve_application_status": {"application"},
    # Ray's agents and raylets
    "ray_node_mem_used": {"ip"},
    "ray_node_mem_total": {"ip"},
    "ray_node_gram_used": {"ip", "GpuIndex", "GpuDeviceName"},
    "ray_node_gram_available": {"ip", "GpuIndex", "GpuDeviceName"},
    "ray_memory_manager_worker_eviction_total": {"Type", "Name"},
}
"""Metrics of Ray that the pods export beside ours."""
OTHERS: Mapping[str, set[str]] = {
    # The KubeRay operator, controllers/ray/metrics/ray_service_metrics.go
    "kuberay_service_condition_ready": {"name", "uid", "condition"},
    "kuberay_service_condition_upgrade_in_progress": {"name", "uid", "condition"},
    # the kubelet, pkg/kubelet/metrics/collectors/volume_stats.go
    "kubelet_volume_stats_available_bytes": {"persistentvolumeclaim"},
    "kubelet_volume_stats_capacity_bytes": {"persistentvolumeclaim"},
    # Prometheus itself, with the alerts' own labels
    "ALERTS": {"alertname", "alertstate", "severity"},
    # kube-state-metrics, docs/metrics/workload/pod-metrics.md
    "kube_pod_container_status_terminated_reason": {"uid", "reason"},
    "kube_pod_container_status_last_terminated_reason": {"uid", "reason"},
    "kube_pod_container_status_restarts_total": {"uid"},
}
"""Metrics of others' exporters."""
WORDS: Mapping[str, set[str]] = {
    "state": {state.value for state in JobState},
    "tier": {tier.value for tier in Tier},
    "sign": {sign.value for sign in Sign},
    "dead": {"yes", "no"},
    "outcome": {outcome.value for outcome in Outcome},
    "alertstate": {"pending", "firing"},
    "pool": {"diffusion", "text-encoder"},
    "condition": {"true", "false"},
    "reason": {"OOMKilled"},
}
"""All values of the labels that have few."""
KINDS: Mapping[str, set[str]] = {
    "ray_tandem_device_memory_bytes": {"allocated", "peak", "total"},
    "ray_tandem_prompt_tokens_total": {"used", "cut", "unknown"},
    "ray_tandem_cache_errors_total": {"timeout", "down", "corrupt", "full", "refused", "crowded"},
}
"""The same of the label `kind`, which is another thing for each metric."""


def complaints(expression: str, records: Mapping[str, set[str]]) -> list[str]:
    """What is wrong with it. `records` are the names that recording rules make, with their labels."""
    try:
        tree = promql.parse(without_grafana(expression))
    except ValueError as error:
        return [f"{error}"]
    found: list[str] = []
    known = {**OURS, **RAYS, **OTHERS, **records}
    for selector in selectors(tree):
        if selector.name not in known:
            found.append(f"there is no metric {selector.name}")
            continue
        labels = known[selector.name] | TARGET
        for matcher in selector.matchers.matchers:
            if matcher.name not in labels:
                found.append(f"{selector.name} has no label {matcher.name}")
            found += _values(selector.name, matcher)
    if not found:
        found += _groupings(tree, known)
    return found


def without_grafana(expression: str) -> str:
    """With what Grafana fills in: an interval. Its other variables stand in strings."""
    return expression.replace("$__rate_interval", "5m")


def selectors(tree: Any) -> list[Any]:
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append(node)

    promql.walk(tree, visit)
    return found


def grouped(tree: Any) -> set[str]:
    """Every label that some aggregation in it keeps."""
    return {label for labels, _ in _aggregations(tree) for label in labels}


def _values(metric: str, matcher: Any) -> Iterator[str]:
    words = KINDS.get(metric) if matcher.name == "kind" else WORDS.get(matcher.name)
    if words is None or "$" in matcher.value:
        return
    for value in matcher.value.split("|"):
        if value not in words:
            yield f"{metric} never has {matcher.name}={value!r}"


def _groupings(tree: Any, known: Mapping[str, set[str]]) -> Iterator[str]:
    for labels, inner in _aggregations(tree):
        for selector in selectors(inner):
            for label in sorted(labels - known[selector.name] - TARGET):
                yield f"{selector.name} is grouped by {label}, which it has not"


def _aggregations(tree: Any) -> list[tuple[set[str], Any]]:
    found: list[tuple[set[str], Any]] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            assert node.modifier.type == promql.AggModifierType.By, "say which labels stay"
            found.append((set(node.modifier.labels), node.expr))

    promql.walk(tree, visit)
    return found


def recorded(groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    """The names that recording rules make, with the labels that their outermost aggregation keeps."""
    found: dict[str, set[str]] = {}
    for rule in (rule for group in groups for rule in group["rules"] if "record" in rule):
        labels, _ = _aggregations(promql.parse(rule["expr"]))[0]
        found[rule["record"]] = labels - {"le"}
    return found


def promtool() -> Path:
    """Prometheus' own tool; without it the test is skipped."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not on the PATH: `apt-get install prometheus`")
    return Path(found)


LEGEND = re.compile(r"{{\s*(\w+)\s*}}")
