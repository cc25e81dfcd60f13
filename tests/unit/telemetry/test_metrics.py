"""Declarations, and the in-process carrier."""

import pytest

from serve.telemetry.declarations import DECLARATIONS, Kind
from serve.telemetry.metrics import InProcessMetrics


def test_every_metric_is_declared_once_and_named_by_convention() -> None:
    names = [each.name for each in DECLARATIONS]
    assert len(set(names)) == len(names)
    for each in DECLARATIONS:
        assert each.name.startswith("tandem_")
        assert each.name.endswith("_total") == (each.kind is Kind.COUNTER)
        assert each.help.endswith(".")
        assert bool(each.buckets) == (each.kind is Kind.HISTOGRAM)
        assert list(each.buckets) == sorted(each.buckets)
        assert not set(each.labels) & set(each.process)
        assert each.kind is Kind.GAUGE or not each.fades


def test_every_declared_metric_can_be_reported() -> None:
    metrics = InProcessMetrics()
    for each in DECLARATIONS:
        labels = dict.fromkeys(each.labels, "x")
        report = {Kind.COUNTER: metrics.inc, Kind.GAUGE: metrics.set, Kind.HISTOGRAM: metrics.observe}[each.kind]
        report(each.name, 1, **labels)
        assert metrics.value(each.name, **labels) == 1


def test_counters_add_gauges_replace_histograms_count() -> None:
    metrics = InProcessMetrics()
    metrics.inc("tandem_text_units_total", 2, encoder="clip-l", tier="redis", sign="positive")
    metrics.inc("tandem_text_units_total", encoder="clip-l", tier="redis", sign="negative")
    metrics.inc("tandem_text_units_total", encoder="t5-xxl", tier="memory", sign="positive")
    assert metrics.value("tandem_text_units_total", tier="redis") == 3
    assert metrics.value("tandem_text_units_total", tier="redis", sign="negative") == 1
    assert metrics.value("tandem_text_units_total") == 4
    assert metrics.value("tandem_text_units_total", tier="encoded") == 0
    metrics.set("tandem_queue_depth", 7)
    metrics.set("tandem_queue_depth", 3)
    assert metrics.value("tandem_queue_depth") == 3
    metrics.observe("tandem_job_seconds", 0.2)
    metrics.observe("tandem_job_seconds", 30)
    assert metrics.value("tandem_job_seconds") == 2


def test_two_instances_share_no_number() -> None:
    first, second = InProcessMetrics(), InProcessMetrics()
    first.inc("tandem_prompts_total")
    assert second.value("tandem_prompts_total") == 0


def test_a_slip_of_the_pen_is_an_error_at_once() -> None:
    metrics = InProcessMetrics()
    with pytest.raises(ValueError, match="not declared"):
        metrics.inc("tandem_jobs")
    with pytest.raises(ValueError, match="is a counter, not a gauge"):
        metrics.set("tandem_jobs_total", 1, state="failed", dead="no")
    with pytest.raises(ValueError, match="takes the labels"):
        metrics.inc("tandem_jobs_total", status="failed")
    with pytest.raises(ValueError, match="takes the labels"):
        metrics.inc("tandem_jobs_total")


def test_the_carrier_says_whose_process_it_is_where_the_declaration_has_it() -> None:
    metrics = InProcessMetrics(placement="small", gpu_class="4gb")
    metrics.inc("tandem_engine_steps_total")
    metrics.set("tandem_device_memory_bytes", 5, pool="diffusion", kind="peak")
    metrics.inc("tandem_prompts_total")
    assert metrics.value("tandem_engine_steps_total", placement="small", gpu_class="4gb") == 1
    assert metrics.value("tandem_device_memory_bytes", placement="small", kind="peak") == 5
    assert metrics.value("tandem_prompts_total") == 1
    with pytest.raises(ValueError, match="takes the labels"):
        metrics.inc("tandem_engine_steps_total", placement="large")


def test_a_carrier_that_nobody_has_told_leaves_it_empty() -> None:
    metrics = InProcessMetrics()
    metrics.set("tandem_spool_bytes", 3)
    assert metrics.value("tandem_spool_bytes", placement="", gpu_class="") == 3
