"""The queries of the panels: series as Ray exports them, of the chosen releases."""

from __future__ import annotations

from typing import Any

from dashboards.panels import Panel, Query

SCOPE = 'namespace=~"$namespace", release=~"$release"'
DISKS = 'namespace=~"$namespace", persistentvolumeclaim=~"data-$release.*-redis-(jobs|gcs)-0"'
"""The kubelet does not know the release, whose name the claims begin with."""
PER = "$__rate_interval"
EVERY_JOB = 'stage="put"'
"""Of the stages, one that each job goes through once."""
NOW = "15m"
"""What a single number is taken over: the same as the alerts, so that a quiet server has one."""


def of(metric: str, *matchers: str) -> str:
    """The series of a metric as Ray exports it, of the chosen releases."""
    return f"ray_{metric}{{{', '.join((SCOPE, *matchers))}}}"


def rate(metric: str, *matchers: str, by: str = "", over: str = PER) -> str:
    return f"sum{_by(by)} (rate({of(metric, *matchers)}[{over}]))"


def share(part: str, whole: str) -> str:
    """A part that nobody has counted yet is none of the whole. Of nothing there is no share."""
    return f"({part} or 0 * {whole}) / ({whole} > 0)"


def quantile(q: float, metric: str, *matchers: str, by: str = "", over: str = PER) -> str:
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({of(f'{metric}_bucket', *matchers)}[{over}])))"


def quantiles(metric: str, *matchers: str, by: str = "", legend: str = "") -> list[Query]:
    return [Query(quantile(q, metric, *matchers, by=by), f"{legend} P{q * 100:.0f}".strip()) for q in (0.5, 0.95, 0.99)]


def told(metric: str, *matchers: str, by: str = "") -> str:
    """Of a gauge that every ingress replica tells alike."""
    return f"max{_by(by)} ({of(metric, *matchers)})"


def total(metric: str, *matchers: str, by: str = "", inner: str = "") -> str:
    """Summed over what is told alike for each of `inner`."""
    return f"sum{_by(by)} ({told(metric, *matchers, by=inner)})"


def stat(title: str, description: str, expr: str, unit: str = "short", height: int = 4, **other: Any) -> Panel:
    query = Query(expr, "", instant=True)
    return Panel(title, description, [query], unit, kind="stat", width=4, height=height, **other)


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


UNITS, TEXT = "tandem_text_units_total", 'sign!="empty"'
MEMORY, ALLOCATED = "tandem_device_memory_bytes", 'kind=~"allocated|peak"'
ENCODERS, DENOISERS = 'pool="text-encoder"', 'pool="diffusion"'


def limits(orange: float, red: float) -> list[tuple[float, str]]:
    return [(orange, "orange"), (red, "red")]


def hit_share(*matchers: str, by: str = "") -> str:
    encoded = rate(UNITS, 'tier="encoded"', *matchers, by=by)
    return f"1 - {share(encoded, rate(UNITS, *matchers, by=by))}"


def failed(over: str = PER) -> str:
    """As TandemJobsFail counts: without what clients cancel, and orders that can't be drawn as they stand."""
    dead, expired, due = (
        f"rate({of('tandem_jobs_total', matcher)}[{over}])"
        for matcher in ('dead="yes"', 'state="expired"', 'state=~"expired|succeeded"')
    )
    return share(f"sum ({dead} or {expired})", f"sum ({dead} or {due})")


def answered(*matchers: str, by: str = "", over: str = PER) -> str:
    selector = f"ray_serve_num_http_requests_total{{{', '.join((SCOPE, *matchers))}}}"
    return f"sum{_by(by)} (rate({selector}[{over}]))"


ENCODER, PLACEMENT, MODEL = 'encoder=~"$encoder"', 'placement=~"$placement"', 'model=~"$model"'
BY_PLACE = "placement, gpu_class"
ARM, BY_ARM = "template, arm", "{{template}} {{arm}}"
EACH_PLACE = "namespace, release, model, placement, gpu_class"
"""By which all ingress replicas tell the same of a placement."""
STATES = {
    0: ("unknown", "red"),
    1: ("failed to deploy", "red"),
    2: ("unhealthy", "red"),
    3: ("not started", "orange"),
    4: ("being deleted", "orange"),
    5: ("deploying", "orange"),
    6: ("running", "green"),
}
"""Of an application: ray.serve.schema.ApplicationStatus.to_numeric."""
