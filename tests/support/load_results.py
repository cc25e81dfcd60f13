"""Runs that never were: samples and metrics whose figures are known by hand."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from loadtest.report.results import Result
from loadtest.report.series import Key, Page, Series
from loadtest.samples import Outcome, Sample

STARTED_AT = 1_800_000_000.0


def sample(index: int = 0, **parts: Any) -> Sample:
    """A picture that was ordered at 0 and there after a second, but for what is named."""
    due = parts.get("due_s", 0.0)
    usual = {
        "dialect": "wait",
        "due_s": due,
        "sent_s": due,
        "ended_s": due + 1.0,
        "outcome": Outcome.DONE,
        "status": 200,
    }
    return Sample(index=index, **(usual | parts))


def result(*samples: Sample, **parts: Any) -> Result:
    usual = {
        "workload": "mixed",
        "target": "http://127.0.0.1:8000",
        "started_at": STARTED_AT,
        "duration_s": 10.0,
        "deadline_s": 2.0,
    }
    return Result(samples=samples, **(usual | parts))


def page(
    at_s: float, values: Mapping[Key, float] | None = None, error: str = "", url: str = "http://a/metrics"
) -> Page:
    """A look at `at_s` after the start."""
    return Page(at=STARTED_AT + at_s, url=url, values=values or {}, error=error)


def key(name: str, **labels: str) -> Key:
    return name, tuple(sorted(labels.items()))


def busy(requests: int = 600, seconds: float = 180.0, seed: int = 1) -> Result:
    """A run as a small server under load makes it, with a middle that is too much for it."""
    rng = random.Random(seed)
    samples, free_at = [], 0.0
    for index in range(requests):
        due = seconds * (index + rng.random()) / requests
        slow = 1.9 if 0.4 < due / seconds < 0.6 else 1.0
        queued = max(0.0, free_at - due)
        dialect = rng.choice(("wait", "events", "poll"))
        if queued > 6:
            samples.append(
                sample(
                    index,
                    dialect=dialect,
                    due_s=due,
                    ended_s=due + 0.02,
                    outcome=Outcome.REFUSED,
                    status=503,
                    detail="queue_full",
                )
            )
            continue
        steps = rng.uniform(0.1, 0.5)
        free_at = max(free_at, due) + slow * seconds / requests * 0.85
        told = _timings(rng, queued, steps)
        ended = due + told["total_s"] + 0.02 + (0.25 if dialect == "poll" else 0.0)
        samples.append(
            sample(index, dialect=dialect, due_s=due, sent_s=due + 0.002, ended_s=ended, job=_job(index, told))
        )
    samples.append(sample(requests, due_s=seconds / 2, outcome=Outcome.FAILED, status=200, detail="out_of_memory"))
    samples.append(sample(requests + 1, due_s=seconds / 2, outcome=Outcome.LEFT, status=0, hangs_up=True))
    return result(
        *samples,
        duration_s=seconds,
        warm_up_s=seconds / 9,
        deadline_s=5.0,
        series=Series(tuple(_pages(samples, seconds))),
        machine="AMD EPYC, 2 cores; 8 GB; Linux x86_64; Python 3.12; seed 1",
        settings={"name": "mixed", "rate": requests / seconds, "prompts": {"repetition": "zipf:1.0", "texts": 500}},
    )


def _timings(rng: random.Random, queued: float, steps: float) -> dict[str, Any]:
    told = {
        "admission_s": rng.uniform(0.003, 0.006),
        "queued_s": queued,
        "claim_s": 0.002,
        "text_s": rng.uniform(0.001, 0.03),
        "batch_s": rng.uniform(0.0, 0.3),
        "steps_s": steps,
        "decode_wait_s": rng.uniform(0, 0.02),
        "decode_s": rng.uniform(0.03, 0.06),
        "compress_s": 0.01,
        "put_s": 0.004,
    }
    return told | {
        "total_s": sum(told.values()) - told["admission_s"] + 0.003,
        "told_s": 0.004,
        "ahead_s": 0.02,
        "text_from": rng.choice(("memory", "redis", "encoded")),
        "batch_images": min(8.0, 1 + 2 * queued + rng.uniform(0, 2)),
    }


def _job(index: int, timings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": f"{index:032x}",
        "state": "succeeded",
        "attempt": 1,
        "timings": dict(timings),
        "cache": {"memory": 1, "redis": index % 2, "encoded": int(index % 7 == 0)},
        "request": {"num_images": 1, "prompt": "a red circle on a blue background", "num_inference_steps": 20},
    }


def _pages(samples: list[Sample], seconds: float) -> list[Page]:
    """As Ray's export tells it: gauges every five seconds, counters every ten, a gap at a third of the time."""
    pages = []
    for tick in range(int(seconds / 2) + 7):
        at = 2.0 * tick
        if abs(at - seconds / 3) < 5:
            pages.append(page(at, error="no answer (ConnectTimeout)"))
            continue
        told_at = at - at % 10
        done = [one for one in samples if one.outcome is Outcome.DONE and one.ended_s <= told_at]
        waiting = [
            one
            for one in samples
            if one.due_s <= at < one.due_s + (one.job or {}).get("timings", {}).get("queued_s", 0)
        ]
        values: dict[Key, float] = {
            key("tandem_engine_steps_total", WorkerId="w"): 20.0
            * sum(1 / one.job["timings"]["batch_images"] for one in done if one.job),
            key("tandem_engine_image_steps_total", WorkerId="w"): 20.0 * len(done),
            key("tandem_queue_age_seconds", model="shapes", WorkerId="i"): max(
                [at - one.due_s for one in waiting], default=0.0
            ),
            key("tandem_queue_depth", WorkerId="i"): float(len(waiting)),
            key("tandem_replicas", model="shapes", placement="default", gpu_class="", WorkerId="i"): 1.0
            if at < seconds / 2
            else 2.0,
            key("tandem_replicas_wanted", model="shapes", placement="default", gpu_class="", WorkerId="i"): 1.0
            if at < seconds / 2.5
            else 2.0,
            key("tandem_jobs_total", state="succeeded", dead="no", WorkerId="i"): float(len(done)),
            key("tandem_encoder_forward_rows_total", encoder="clip-l", WorkerId="e"): 0.4 * len(done),
        }
        for sign, shares in {
            "positive": (0.5, 0.2, 0.3),
            "negative": (0.9, 0.05, 0.05),
            "empty": (0.3, 0.0, 0.0),
        }.items():
            for tier, share in zip(("memory", "redis", "encoded"), shares, strict=True):
                values[key("tandem_text_units_total", encoder="clip-l", sign=sign, tier=tier, WorkerId="w")] = (
                    share * len(done)
                )
        pages.append(
            page(at, {name: value for name, value in values.items() if value or not name[0].endswith("_total")})
        )
    return pages
