"""What a run comes to: one frozen result, and the figures over its arrival window."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

from pydantic import TypeAdapter

from loadtest.report.series import Series
from loadtest.report.thresholds import Bound
from loadtest.samples import Outcome, Sample
from loadtest.tail import Tail
from serve.bench.stats import Percentiles
from serve.domain.jobs import Timings
from serve.stages import STAGES, stages, wall_s

TEXT_DIALECTS = frozenset({"embeddings"})
"""Dialects whose answer is no picture."""
_TIMINGS = TypeAdapter(Timings)
_FAILED = (Outcome.FAILED, Outcome.LATE, Outcome.INVALID, Outcome.BROKEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A run. `started_at` is the senders' zero in Unix seconds, which ties their times to the metrics'; requests were
    due in [0, `duration_s`), and what was due or ended before `warm_up_s` is in no figure. `settings` is the workload
    as it was run, `machine` a line about where."""

    workload: str
    target: str
    started_at: float
    duration_s: float
    deadline_s: float
    samples: tuple[Sample, ...]
    warm_up_s: float = 0.0
    series: Series = field(default_factory=Series)
    machine: str = ""
    thresholds: Mapping[str, Bound] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def window_s(self) -> float:
        """Raises ValueError where the warm-up leaves nothing."""
        left = self.duration_s - self.warm_up_s
        if left <= 0:
            raise ValueError(f"a warm-up of {self.warm_up_s:g} s in a run of {self.duration_s:g} s")
        return left

    @property
    def counted(self) -> list[Sample]:
        """Those that were due after the warm-up."""
        return [one for one in self.samples if self.warm_up_s <= one.due_s < self.duration_s]

    @property
    def stayed(self) -> list[Sample]:
        """Those of them whose clients were to stay. A client that was to leave says nothing of the server: it is only
        served where that is quick."""
        return [one for one in self.counted if not one.hangs_up]

    @property
    def unit(self) -> str:
        """What throughput counts: pictures, or texts where nobody asked for a picture."""
        return "pictures" if any(one.dialect not in TEXT_DIALECTS for one in self.samples) else "texts"

    def counting(self, samples: Iterable[Sample]) -> list[Sample]:
        """Those of them that asked for what throughput counts."""
        texts = self.unit == "texts"
        return [one for one in samples if texts or one.dialect not in TEXT_DIALECTS]

    def good(self, sample: Sample) -> bool:
        """Finished within the deadline, from when it was due."""
        return sample.outcome is Outcome.DONE and sample.latency_s <= self.deadline_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of a run. Rates are a second, times seconds.

    Rates of finished pictures (texts, where the run asked for none) go by when they ended: what ended in the window
    after the warm-up. What the server still draws when nobody sends any more is not what it sustains under load.
    All else goes by when a request was due. `requests` leaves out the `hang_ups`, whose clients were to leave early:
    they are in what was offered, in `send_lag`, in the rates and in `trouble`, and in nothing else. `good` ended within
    the deadline; `failed` did not work, was invalid, or not answered in time. `latency` is that of all pictures (texts)
    that were not refused, those that never came counted as endless; `dialects` the same of all requests. All times but
    `send_lag` are from the intended send time. `hits` counts text units by sign and tier from the metrics, `job_hits`
    by tier from the jobs themselves. `mean_batch` is images a step: of the metrics, or of the jobs where there are
    none. `stages` are a job's mean seconds. `doubts` says what a reader of the figures must know.
    """

    unit: str
    window_s: float
    requests: int
    hang_ups: int
    good: int
    refused: int
    failed: int
    offered_per_s: float
    throughput_per_s: float
    goodput_per_s: float
    latency: Tail | None
    dialects: Mapping[str, Tail]
    refusals: Percentiles | None
    send_lag: Percentiles | None
    trouble: Mapping[str, int]
    hits: Mapping[str, Mapping[str, float]]
    job_hits: Mapping[str, int]
    encoded_rows_per_job: float | None
    mean_batch: float | None
    queue_age_max_s: float | None
    stages: Mapping[str, float]
    explained_ratio: float | None
    doubts: tuple[str, ...]

    def hit_ratio(self, sign: str | None = None) -> float | None:
        """Share of the text units of one side of the guidance, or of both, that no encoder computed. Empty text, which
        everybody shares, is in neither. None where no metrics tell."""
        signs = ("positive", "negative") if sign is None else (sign,)
        units = [self.hits[each] for each in signs if each in self.hits]
        whole = sum(sum(tiers.values()) for tiers in units)
        return 1 - sum(tiers.get("encoded", 0.0) for tiers in units) / whole if whole > 0 else None


def summary(result: Result) -> Summary:
    """Raises ValueError where the warm-up leaves nothing."""
    window = result.window_s
    due = result.counted
    asked = result.stayed
    taken = [one for one in asked if one.outcome is not Outcome.REFUSED]
    done = [one for one in asked if one.outcome is Outcome.DONE]
    ended = [one for one in result.samples if result.warm_up_s <= one.ended_s < result.duration_s]
    ended = result.counting(one for one in ended if one.outcome is Outcome.DONE)
    refused = [one for one in asked if one.outcome is Outcome.REFUSED]
    jobs = [one.job for one in done if one.job is not None]
    told = [each for one in done if (each := timings(one)) is not None]
    return Summary(
        unit=result.unit,
        window_s=window,
        requests=len(asked),
        hang_ups=len(due) - len(asked),
        good=sum(result.good(one) for one in asked),
        refused=len(refused),
        failed=sum(one.outcome in _FAILED for one in asked),
        offered_per_s=len(due) / window,
        throughput_per_s=sum(map(pictures, ended)) / window,
        goodput_per_s=sum(pictures(one) for one in ended if result.good(one)) / window,
        latency=Tail.of(pictured) if (pictured := result.counting(taken)) else None,
        dialects=_by_dialect(taken),
        refusals=_percentiles([one.latency_s for one in refused]),
        send_lag=_percentiles([one.sent_s - one.due_s for one in due]),
        trouble=_trouble(due),
        hits=_hits(result),
        job_hits=_job_hits(jobs),
        encoded_rows_per_job=_rows_per_job(result),
        mean_batch=_mean_batch(result, told),
        queue_age_max_s=_largest(result, "tandem_queue_age_seconds"),
        stages=_stages(told),
        explained_ratio=_explained(told),
        doubts=tuple(_doubts(result, due)),
    )


def pictures(sample: Sample) -> int:
    """How many a finished request brought; 1 where the server did not say."""
    request = (sample.job or {}).get("request")
    number = request.get("num_images", 1) if isinstance(request, Mapping) else 1
    return int(number or 1)


def timings(sample: Sample) -> Timings | None:
    """Where the job's time went; None where the server told of no end."""
    told = (sample.job or {}).get("timings")
    found = _TIMINGS.validate_python(told) if isinstance(told, Mapping) else None
    return found if found is not None and found.total_s is not None else None


def _percentiles(seconds: Sequence[float]) -> Percentiles | None:
    return Percentiles.of(seconds) if seconds else None


def _by_dialect(taken: Sequence[Sample]) -> dict[str, Tail]:
    ordered = sorted(taken, key=lambda one: one.dialect)
    return {dialect: Tail.of(list(group)) for dialect, group in groupby(ordered, key=lambda one: one.dialect)}


def _trouble(due: Sequence[Sample]) -> dict[str, int]:
    """How many requests ended otherwise than well or planned, by outcome, status and reason; the most frequent
    first."""
    kinds: Counter[str] = Counter()
    for one in due:
        if one.outcome not in (Outcome.DONE, Outcome.LEFT):
            status = f" {one.status}" if one.status else ""
            kinds[f"{one.outcome}{status}: {one.detail}" if one.detail else f"{one.outcome}{status}"] += 1
    return dict(kinds.most_common())


def _totals(result: Result) -> Callable[..., dict[tuple[str, ...], float]]:
    since, until = result.started_at + result.warm_up_s, result.started_at + result.duration_s
    last = max((one.ended_s for one in result.samples), default=0.0) + result.started_at
    # Work of the window ends, and is told, after it.
    return partial(_total, result.series, since, max(until, last) + 2 * result.series.refresh_s)


def _total(series: Series, since: float, until: float, name: str, *by: str) -> dict[tuple[str, ...], float]:
    return series.total(name, since, until, *by)


def _hits(result: Result) -> dict[str, dict[str, float]]:
    hits: dict[str, dict[str, float]] = {}
    for (sign, tier), units in _totals(result)("tandem_text_units_total", "sign", "tier").items():
        hits.setdefault(sign, {})[tier] = units
    return hits


def _job_hits(jobs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    units: Counter[str] = Counter()
    for job in jobs:
        units.update({tier: int(number) for tier, number in (job.get("cache") or {}).items()})
    return dict(units)


def _rows_per_job(result: Result) -> float | None:
    totals = _totals(result)
    jobs = sum(totals("tandem_jobs_total").values())
    rows = sum(totals("tandem_encoder_forward_rows_total").values())
    return rows / jobs if jobs > 0 else None


def _mean_batch(result: Result, told: Sequence[Timings]) -> float | None:
    totals = _totals(result)
    steps = sum(totals("tandem_engine_steps_total").values())
    if steps > 0:
        return sum(totals("tandem_engine_image_steps_total").values()) / steps
    shared = [each.batch_images for each in told if each.batch_images is not None]
    return sum(shared) / len(shared) if shared else None


def _largest(result: Result, gauge: str) -> float | None:
    since, until = result.started_at + result.warm_up_s, result.started_at + result.duration_s
    seen = [
        value
        for points in result.series.gauge(gauge).values()
        for at, value in points
        if since <= at < until and value == value
    ]
    return max(seen, default=None)


def _stages(told: Sequence[Timings]) -> dict[str, float]:
    """Mean seconds of a job in each stage, those that it did not go through counted as 0."""
    sums = dict.fromkeys(STAGES, 0.0)
    for each in told:
        for name, seconds in stages(each):
            sums[name] += seconds
    return {name: seconds / len(told) for name, seconds in sums.items() if seconds}


def _explained(told: Sequence[Timings]) -> float | None:
    """Of all jobs' time; no job whose stages overlap makes up for the gaps of another."""
    walls = [wall_s(each) or 0.0 for each in told]
    held = (min(wall, sum(seconds for _, seconds in stages(each))) for each, wall in zip(told, walls, strict=True))
    return sum(held) / whole if (whole := sum(walls)) else None


def _doubts(result: Result, due: Sequence[Sample]) -> list[str]:
    doubts = []
    lag = _percentiles([one.sent_s - one.due_s for one in due])
    if lag is not None and lag.p99 > 0.1 * result.deadline_s:
        doubts.append(
            f"The client itself sent late (P99 {1e3 * lag.p99:.0f} ms): it shares its processors with others."
        )
    if not due:
        doubts.append("No request was due after the warm-up.")
    if gaps := len(result.series.gaps):
        doubts.append(f"{gaps} of {len(result.series.pages)} looks at the metrics found nothing.")
    return doubts
