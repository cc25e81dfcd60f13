"""Tandem's metrics, reported through Ray: each node's agent serves them to Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable

from ray.util import metrics as ray_metrics

from serve.devices import gpu_usage
from serve.telemetry.declarations import DECLARATIONS, Kind, declared, process_labels
from serve.telemetry.metrics import Metrics

Told = tuple[str, tuple[tuple[str, str], ...]]

TELL_S = 5.0
"""Between two times that gauges are told: half of what Ray's export waits."""


class RayMetrics:
    """The carrier of `serve.telemetry.metrics.Metrics` inside a replica.

    Ray appends `_total` to a counter's name on export, so the declared names lose it here and regain it there. It hands
    a gauge on once for each time that it is set, and Prometheus finds none of it half a minute later: what is to hold
    must be told again, about as often as Ray exports (10 s).

    Owns: one Ray metric for each declaration, and what the gauges that hold were set to.
    """

    def __init__(self, placement: str = "", gpu_class: str | None = None) -> None:
        """`placement` is that of a diffusion replica, `gpu_class` a replica's by its name in the settings."""
        self._process = process_labels({"placement": placement, "gpu_class": gpu_class or ""})
        self._counters: dict[str, ray_metrics.Counter] = {}
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._histograms: dict[str, ray_metrics.Histogram] = {}
        self._held: dict[Told, float] = {}
        self._telling = threading.Lock()
        for each in DECLARATIONS:
            name, labels = each.name.removesuffix("_total"), (*each.labels, *each.process)
            if each.kind is Kind.COUNTER:
                self._counters[each.name] = ray_metrics.Counter(name, each.help, labels)
            elif each.kind is Kind.GAUGE:
                self._gauges[each.name] = ray_metrics.Gauge(name, each.help, labels)
            else:
                self._histograms[each.name] = ray_metrics.Histogram(name, each.help, list(each.buckets), labels)

    def inc(self, name: str, value: float = 1, **labels: str) -> None:
        declared(name, Kind.COUNTER, tuple(labels))
        if value:  # Ray's own refuses a zero, which elsewhere is nothing to count
            self._counters[name].inc(value, labels | self._process[name])

    def observe(self, name: str, value: float, **labels: str) -> None:
        declared(name, Kind.HISTOGRAM, tuple(labels))
        self._histograms[name].observe(value, labels | self._process[name])

    def set(self, name: str, value: float, **labels: str) -> None:
        declaration = declared(name, Kind.GAUGE, tuple(labels))
        with self._telling:
            self._tell(name, value, labels)
            if not declaration.fades:
                self._held[name, tuple(sorted(labels.items()))] = value

    def tell_again(self) -> None:
        """Set every gauge that holds to what it is. To be called every few seconds: by whoever asks for the replica's
        health, so that one that hangs falls silent, and by a replica that drains, whose health Serve asks for no more
        (2.60)."""
        with self._telling:
            for (name, labels), value in self._held.items():
                self._tell(name, value, dict(labels))

    def _tell(self, name: str, value: float, labels: dict[str, str]) -> None:
        self._gauges[name].set(value, labels | self._process[name])


def tell_device(metrics: Metrics, pool: str) -> None:
    """The state of this process's GPUs, where it computes on any."""
    usage = gpu_usage()
    if usage is None:
        return
    for kind in ("allocated", "peak", "allowed", "total"):
        metrics.set("tandem_device_memory_bytes", getattr(usage, kind), pool=pool, kind=kind)
    if usage.utilization is not None:
        metrics.set("tandem_device_utilization_ratio", usage.utilization, pool=pool)


@contextlib.asynccontextmanager
async def telling(tell: Callable[[], None], interval_s: float = TELL_S) -> AsyncIterator[None]:
    """Meanwhile `tell` is called again and again."""

    async def again() -> None:
        while True:
            tell()
            await asyncio.sleep(interval_s)

    task = asyncio.create_task(again())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
