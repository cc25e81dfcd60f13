"""Where metrics go. Rooms take a `Metrics` and name the metric; the carrier decides.

`InProcessMetrics` keeps the numbers in this process, the Ray shell has a second implementation that reports through
Ray. A name that is not declared, a wrong kind or a wrong set of labels is a programming error and raises ValueError at
once.

Which replica a process is, no room need know: the carrier is told once, and puts it on where the declaration has it.
"""

from __future__ import annotations

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from serve.telemetry.declarations import BY_NAME, DECLARATIONS, Kind, declared, process_labels


class Metrics(Protocol):
    """What a room may do with metrics. All methods may be called from any thread."""

    def inc(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one observation to a histogram."""

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""


def count_stage(metrics: Metrics, stage: str, seconds: float) -> None:
    """A job has spent so long in a stage. Twice: a mean can't be had of a histogram that Ray exports."""
    metrics.observe("tandem_stage_seconds", seconds, stage=stage)
    metrics.inc("tandem_stage_spent_seconds_total", seconds, stage=stage)


class InProcessMetrics:
    """Owns: a Prometheus registry of its own with every declared metric, so that two instances never share a number."""

    def __init__(self, **process: str) -> None:
        """`process` are values of the declarations' `process` labels."""
        self.registry = CollectorRegistry()
        self._process = process_labels(process)
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for each in DECLARATIONS:
            labels = (*each.labels, *each.process)
            if each.kind is Kind.COUNTER:
                self._counters[each.name] = Counter(each.name, each.help, labels, registry=self.registry)
            elif each.kind is Kind.GAUGE:
                self._gauges[each.name] = Gauge(each.name, each.help, labels, registry=self.registry)
            else:
                self._histograms[each.name] = Histogram(
                    each.name, each.help, labels, registry=self.registry, buckets=each.buckets
                )

    def inc(self, name: str, value: float = 1, **labels: str) -> None:
        declared(name, Kind.COUNTER, tuple(labels))
        counter, all_labels = self._counters[name], labels | self._process[name]
        (counter.labels(**all_labels) if all_labels else counter).inc(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        declared(name, Kind.HISTOGRAM, tuple(labels))
        histogram, all_labels = self._histograms[name], labels | self._process[name]
        (histogram.labels(**all_labels) if all_labels else histogram).observe(value)

    def set(self, name: str, value: float, **labels: str) -> None:
        declared(name, Kind.GAUGE, tuple(labels))
        gauge, all_labels = self._gauges[name], labels | self._process[name]
        (gauge.labels(**all_labels) if all_labels else gauge).set(value)

    def value(self, name: str, **labels: str) -> float:
        """A counter's or gauge's number, a histogram's number of observations. Labels left out are summed over."""
        declaration = BY_NAME[name]
        sample_name = f"{name}_count" if declaration.kind is Kind.HISTOGRAM else name
        return sum(
            sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == sample_name and labels.items() <= sample.labels.items()
        )
