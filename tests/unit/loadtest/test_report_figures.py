"""What a run comes to, on samples whose figures can be worked out by hand."""

import math

import pytest
from support.load_results import STARTED_AT, key, page, result, sample

from loadtest.report.results import summary
from loadtest.report.series import Page, Series
from loadtest.report.thresholds import FIGURES
from loadtest.samples import Outcome


def test_latency_counts_from_the_intended_send_time() -> None:
    # Due every 0.1 s, sent half a second late, answered 10, 20, ... 1000 ms after they were due.
    samples = [sample(n, due_s=n / 10, sent_s=n / 10 + 0.5, ended_s=n / 10 + (n + 1) / 100) for n in range(100)]
    told = summary(result(*samples))
    assert told.latency is not None
    assert told.latency.count == 100
    # numpy's linear percentiles of 0.01 ... 1.00: 0.01 + 0.99 p
    assert (told.latency.p50, told.latency.p95, told.latency.p99, told.latency.worst) == pytest.approx(
        (0.505, 0.9505, 0.9901, 1.0)
    )
    assert told.send_lag is not None
    assert told.send_lag.p50 == pytest.approx(0.5)
    assert "sent late (P99 500 ms)" in told.doubts[0]


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.LATE, Outcome.INVALID, Outcome.BROKEN])
def test_what_never_came_took_for_ever_and_refusals_are_apart(outcome: Outcome) -> None:
    done = [sample(n, ended_s=1.0) for n in range(94)]
    lost = [sample(200 + n, outcome=outcome, ended_s=0.1) for n in range(6)]
    refused = [sample(300 + n, outcome=Outcome.REFUSED, ended_s=0.01) for n in range(100)]
    told = summary(result(*done, *lost, *refused))
    assert told.latency is not None
    assert (told.latency.count, told.latency.p50, told.latency.p95) == (100, 1.0, None)
    assert told.dialects["wait"] == told.latency
    assert told.refusals is not None
    assert told.refusals.p99 == pytest.approx(0.01)
    assert FIGURES["p50_s"].of(told) == 1.0
    assert FIGURES["p95_s"].of(told) == math.inf
    assert summary(result(*refused)).latency is None


def test_who_was_to_hang_up_is_in_no_share_and_no_latency_wherever_it_ended() -> None:
    stayed = [sample(0, ended_s=1.5), sample(1, ended_s=9.0)]
    leaving = [
        sample(2, ended_s=0.1, hangs_up=True, job={"timings": {"steps_s": 0.0, "total_s": 1.0}}),
        sample(3, outcome=Outcome.LEFT, status=0, hangs_up=True),
        sample(4, outcome=Outcome.REFUSED, status=503, hangs_up=True),
        sample(5, outcome=Outcome.FAILED, status=500, hangs_up=True),
    ]
    told, alone = summary(result(*stayed, *leaving)), summary(result(*stayed))
    assert told.hang_ups == 4
    shares = ("requests", "good", "refused", "failed", "latency", "dialects", "refusals", "explained_ratio", "stages")
    assert all(getattr(told, name) == getattr(alone, name) for name in shares)
    assert told.offered_per_s == pytest.approx(0.6)
    assert told.throughput_per_s == pytest.approx(0.3)
    assert told.trouble == {"refused 503": 1, "failed 500": 1}


def test_throughput_counts_what_ended_in_the_window_and_goodput_what_was_in_time() -> None:
    samples = [
        sample(0, due_s=0.5, ended_s=1.5),  # ended in the warm-up
        sample(1, due_s=1.9, ended_s=2.5),  # due in the warm-up, ended in the window, in time
        sample(7, due_s=1.9, ended_s=3.0),
        sample(2, due_s=3.0, ended_s=5.0),  # just in time
        sample(3, due_s=3.0, ended_s=5.001),  # too late
        sample(4, due_s=9.5, ended_s=10.5),  # ended after the window, in time
        sample(5, due_s=4.0, ended_s=4.01, outcome=Outcome.REFUSED, status=503),
        sample(6, due_s=4.0, ended_s=5.0, outcome=Outcome.LEFT, status=0, hangs_up=True),
    ]
    told = summary(result(*samples, duration_s=10.0, warm_up_s=2.0, deadline_s=2.0))
    assert told.window_s == 8.0
    assert told.throughput_per_s == pytest.approx(4 / 8)
    assert told.goodput_per_s == pytest.approx(3 / 8)
    assert (told.requests, told.hang_ups, told.refused, told.failed, told.good) == (4, 1, 1, 0, 2)
    assert told.offered_per_s == pytest.approx(5 / 8)
    assert told.latency is not None
    assert told.latency.count == 3
    assert told.refusals is not None
    assert told.refusals.worst == pytest.approx(0.01)


def test_a_job_of_four_pictures_counts_four() -> None:
    told = summary(result(sample(0, job={"request": {"num_images": 4}}), sample(1), duration_s=5.0))
    assert told.throughput_per_s == pytest.approx(1.0)


def test_texts_count_only_where_nobody_asked_for_a_picture() -> None:
    texts = [sample(n, dialect="embeddings", ended_s=0.1) for n in range(4)]
    alone, mixed = summary(result(*texts)), summary(result(*texts, sample(9)))
    assert (alone.unit, alone.throughput_per_s) == ("texts", 0.4)
    assert (mixed.unit, mixed.throughput_per_s) == ("pictures", 0.1)
    assert mixed.latency is not None
    assert mixed.latency.count == 1
    assert {dialect: of.count for dialect, of in mixed.dialects.items()} == {"embeddings": 4, "wait": 1}


def test_trouble_is_told_by_kind_the_most_frequent_first() -> None:
    refused = {"outcome": Outcome.REFUSED, "status": 503, "detail": "queue_full"}
    samples = [sample(n, **refused) for n in range(3)]
    samples += [sample(4, outcome=Outcome.BROKEN, status=0), sample(5, outcome=Outcome.LEFT, status=0, hangs_up=True)]
    assert summary(result(*samples)).trouble == {"refused 503: queue_full": 3, "broken": 1}


def test_stages_are_means_over_all_jobs_and_explain_their_share() -> None:
    one = {"admission_s": 0.1, "queued_s": 0.3, "steps_s": 0.4, "total_s": 0.8, "told_s": 0.1}
    other = {"admission_s": 0.1, "steps_s": 0.9, "total_s": 0.9, "batch_images": 3.0}
    told = summary(result(sample(0, job={"timings": one}), sample(1, job={"timings": other}), sample(2)))
    assert told.stages == pytest.approx({"admission": 0.1, "queued": 0.15, "steps": 0.65, "told": 0.05})
    assert told.explained_ratio == pytest.approx((0.9 + 1.0) / (1.0 + 1.0))
    assert told.mean_batch == 3.0


def test_stages_that_overlap_make_up_for_nobody_s_gaps() -> None:
    double, half = {"steps_s": 2.0, "total_s": 1.0}, {"steps_s": 0.5, "total_s": 1.0}
    told = summary(result(sample(0, job={"timings": double}), sample(1, job={"timings": half})))
    assert told.explained_ratio == pytest.approx(0.75)


def test_an_unfinished_job_s_stages_are_not_counted() -> None:
    assert summary(result(sample(0, job={"timings": {"queued_s": 5.0, "total_s": None}}))).stages == {}


def test_hits_by_tier_and_sign_count_the_growth_within_the_run() -> None:
    def units(at: float, **told: float) -> Page:
        values = {}
        for name, value in told.items():
            sign, tier = name.split("_")
            values[key("tandem_text_units_total", encoder="e", sign=sign, tier=tier, WorkerId="w")] = value
        return page(at, values)

    pages = (
        units(-30.0, positive_memory=90, positive_encoded=90),  # what was before the run is not its own
        units(-28.0, positive_memory=100, positive_encoded=100),
        units(12.0, positive_memory=100, positive_encoded=100),
        units(14.0, positive_memory=103, positive_encoded=101, negative_memory=4, empty_memory=50),
        units(20.0, positive_memory=106, positive_encoded=102, negative_memory=8, empty_memory=99),
    )
    told = summary(result(sample(), series=Series(pages)))
    positive, negative = {"memory": 6, "encoded": 2}, {"memory": 8}
    assert told.hits == {"positive": positive, "negative": negative, "empty": {"memory": 99}}
    assert told.hit_ratio("positive") == pytest.approx(6 / 8)
    assert told.hit_ratio("negative") == 1.0
    assert told.hit_ratio() == pytest.approx(14 / 16)
    assert summary(result(sample())).hit_ratio() is None


def test_figures_of_metrics_leave_out_the_warm_up() -> None:
    steps, images = key("tandem_engine_steps_total"), key("tandem_engine_image_steps_total")
    age = key("tandem_queue_age_seconds", model="shapes")
    rows, jobs = key("tandem_encoder_forward_rows_total", encoder="e"), key("tandem_jobs_total", state="succeeded")
    pages = [
        page(20.0 * n, {steps: 100.0 * n, images: made, age: waited, rows: 10.0 * n, jobs: 5.0 * n})
        for n, (made, waited) in enumerate(((0.0, 0.0), (100.0, 50.0), (500.0, 2.0), (900.0, 7.0), (901.0, math.nan)))
    ]
    told = summary(result(sample(), duration_s=80.0, warm_up_s=30.0, series=Series(tuple(pages))))
    assert told.queue_age_max_s == 7.0
    assert told.encoded_rows_per_job == pytest.approx(2.0)
    assert told.mean_batch is not None
    assert 2.0 < told.mean_batch < 4.0


def test_looks_that_found_nothing_are_told() -> None:
    told = summary(result(sample(), series=Series((page(1.0), page(2.0, error="status 503")))))
    assert told.doubts == ("1 of 2 looks at the metrics found nothing.",)


def test_nothing_at_all_is_a_summary_too() -> None:
    told = summary(result())
    assert (told.requests, told.latency, told.throughput_per_s) == (0, None, 0.0)
    assert told.doubts == ("No request was due after the warm-up.",)
    with pytest.raises(ValueError, match="warm-up of 10 s"):
        summary(result(warm_up_s=10.0, started_at=STARTED_AT))
