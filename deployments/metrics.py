"""Tandem's metrics, reported through Ray: each node's agent serves them to Prometheus."""

from __future__ import annotations

from ray.util import metrics as ray_metrics

from serve.devices import gpu_usage
from serve.telemetry.metrics import DECLARATIONS, Kind, Metrics, declared


class RayMetrics:
    """The carrier of `serve.telemetry.metrics.Metrics` inside a replica.

    Ray appends `_total` to a counter's name on export, so the declared names lose it here and regain it there.

    Owns: one Ray metric for each declaration.
    """

    def __init__(self) -> None:
        self._counters: dict[str, ray_metrics.Counter] = {}
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._histograms: dict[str, ray_metrics.Histogram] = {}
        for each in DECLARATIONS:
            name = each.name.removesuffix("_total")
            if each.kind is Kind.COUNTER:
                self._counters[each.name] = ray_metrics.Counter(name, each.help, each.labels)
            elif each.kind is Kind.GAUGE:
                self._gauges[each.name] = ray_metrics.Gauge(name, each.help, each.labels)
            else:
                self._histograms[each.name] = ray_metrics.Histogram(name, each.help, list(each.buckets), each.labels)

    def inc(self, name: str, value: float = 1, **labels: str) -> None:
        declared(name, Kind.COUNTER, tuple(labels))
        if value:  # Ray's own refuses a zero, which elsewhere is nothing to count
            self._counters[name].inc(value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        declared(name, Kind.HISTOGRAM, tuple(labels))
        self._histograms[name].observe(value, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        declared(name, Kind.GAUGE, tuple(labels))
        self._gauges[name].set(value, labels)


def tell_device(metrics: Metrics, pool: str) -> None:
    """The state of this process's GPUs, where it computes on any."""
    usage = gpu_usage()
    if usage is None:
        return
    for kind in ("allocated", "peak", "total"):
        metrics.set("tandem_device_memory_bytes", getattr(usage, kind), pool=pool, kind=kind)
    if usage.utilization is not None:
        metrics.set("tandem_device_utilization_ratio", usage.utilization, pool=pool)
