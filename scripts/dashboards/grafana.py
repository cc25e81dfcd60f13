"""A dashboard as Grafana has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dashboards.panels import Dashboard, Panel, Query, Row, Variable

COLUMNS, ROW_HEIGHT = 24, 1
SCHEMA = 39
"""Of Grafana 10.4 and 11; later ones migrate it."""
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
DEFAULTS = " The colours are the chart's default thresholds, whatever `monitoring.rules` says."


def written(board: Dashboard) -> dict[str, Any]:
    return {
        "uid": f"tandem-{board.name}",
        "title": board.title,
        "description": board.description,
        "tags": ["tandem"],
        "schemaVersion": SCHEMA,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [
            {
                "type": "dashboards",
                "title": "Tandem",
                "tags": ["tandem"],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "templating": {"list": [_source_variable(), *map(_variable, (*_SCOPES, *board.variables))]},
        "annotations": {"list": []},
        "panels": list(_panels(board.rows)),
    }


_SCOPES = (
    Variable("namespace", "Namespace", "label_values(ray_tandem_queue_depth, namespace)"),
    Variable("release", "Release", 'label_values(ray_tandem_queue_depth{namespace=~"$namespace"}, release)'),
)


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1}


def _variable(variable: Variable) -> dict[str, Any]:
    """`All` matches series without the label too, such as those of a server that runs without Kubernetes."""
    return {
        "name": variable.name,
        "label": variable.label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": variable.query, "refId": variable.name},
        "definition": variable.query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panels(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Each row from the left, a new line where the next panel does not fit."""
    number, y = 0, 0
    for row in rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": ROW_HEIGHT},
            "panels": [],
        }
        x, y, tallest = 0, y + ROW_HEIGHT, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            number += 1
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            yield {"id": number, "gridPos": place} | _panel(panel)
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest


def _panel(panel: Panel) -> dict[str, Any]:
    steps = [{"color": "green", "value": None}, *({"color": color, "value": value} for value, color in panel.limits)]
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.least is not None:
        defaults["min"] = panel.least
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.nothing:
        defaults["noValue"] = panel.nothing
    if panel.words:
        told = {f"{value}": {"text": text, "color": color} for value, (text, color) in panel.words.items()}
        defaults["mappings"] = [{"type": "value", "options": told}]
    if panel.kind == "stat":
        options: dict[str, Any] = {
            "colorMode": "value" if panel.limits or panel.words else "none",
            "graphMode": "none",
            "textMode": "value" if len(panel.queries) == 1 else "value_and_name",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        }
    elif panel.kind == "table":
        options = {"showHeader": True}
    else:
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 20 if panel.stacked else 5,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if panel.limits else "off"},
        }
        if panel.usual is not None:
            defaults["custom"]["axisSoftMin"] = panel.usual
        options = {
            "legend": {
                "displayMode": "table" if panel.legend_table else "list",
                "placement": "bottom",
                "calcs": ["lastNotNull", "max"] if panel.legend_table else [],
                "showLegend": True,
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description + (DEFAULTS if panel.limits else ""),
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            _target(query, chr(ord("A") + index), panel.kind == "table") for index, query in enumerate(panel.queries)
        ],
    } | (_WITHOUT_NUMBERS if panel.kind == "table" else {})


_WITHOUT_NUMBERS = {
    "transformations": [{"id": "organize", "options": {"excludeByName": {"Time": True, "Value": True}}}]
}
"""A table of labels."""


def _target(query: Query, ref: str, table: bool) -> dict[str, Any]:
    """A node without a GPU class is called so."""
    classless = f'label_replace({query.expr}, "gpu_class", "no class", "gpu_class", "")'
    return {
        "refId": ref,
        "datasource": SOURCE,
        "expr": classless if "{{gpu_class}}" in query.legend else query.expr,
        "legendFormat": query.legend or "__auto",
        "instant": query.instant,
        "range": not query.instant,
    } | ({"format": "table"} if table else {})
