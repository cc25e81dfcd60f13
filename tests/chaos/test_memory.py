"""Fault 13: a replica has less memory than its plan says, and its allocations fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.chaos import House
from support.chaos_report import Verdict

from serve.domain.jobs import Job, JobState, MemoryReport
from serve.rungs import Rung

pytestmark = [pytest.mark.anyio, pytest.mark.chaos, pytest.mark.timeout(400)]

CAP_MB = 160
"""What the small one gets beside its model: enough to draw 768 x 768 and to decode 512 x 512."""
SMALL = {"memory_mb": 4000, "largest_mb": 11000, "cap_mb": CAP_MB}
LARGE = {"memory_mb": 11000, "largest_mb": 11000}


@pytest.mark.scenario(13, "replica with less memory than its plan, beside a larger one that comes later")
async def test_13_what_fits_a_lower_rung_or_another_card_is_served(tmp_path: Path, seed: int, verdict: Verdict) -> None:
    """Nobody dies, and each job says what was done for it."""
    async with House(tmp_path, seed=seed, workers=0, s3=False) as house:
        house.fleet.plans = {1: SMALL, 2: LARGE}
        await house.fleet.start(1)
        small = [f"small-{number}" for number in range(40)]
        tiled = [f"tiled-{number}" for number in range(4)]
        for number, job in enumerate(small):
            await house.order(job, height=64 + 64 * (number % 2), num_images=1 + number % 3)
        for job in tiled:
            await house.order(job, width=768, height=768)
        for job in small + tiled:
            assert (await house.job(job)).state is JobState.SUCCEEDED
        await house.order("wide", width=2048, height=2048, num_inference_steps=1)
        given_back = await house.seen("wide", lambda job: job.state is JobState.QUEUED and job.attempt == 1)
        late = [f"late-{number}" for number in range(10)]
        for job in late:
            await house.order(job)
            assert (await house.job(job)).state is JobState.SUCCEEDED
        await house.fleet.join()
        await house.ended(120)
        jobs = {job: await house.job(job) for job in [*small, *tiled, "wide", *late]}
        history = await house.history()
        assert house.fleet.deaths == 0
    short = [job for job in jobs.values() if job.memory and job.memory.retries]
    ends = verdict.of(len(short), history, note=", ".join(sorted(set(map(told, short)))))
    assert ends == {JobState.SUCCEEDED: len(jobs)}
    assert {jobs[job].approximate for job in tiled} == {("tiled_vae",)}
    assert all(jobs[job].attempt == 1 for job in [*small, *tiled, *late])
    assert given_back.memory is not None
    assert given_back.memory.above_mb == SMALL["memory_mb"]
    wide = jobs["wide"].memory
    assert wide is not None
    assert (wide.rung, wide.relief[-1].measure, jobs["wide"].attempt) == (Rung.RESIDENT, "another_card", 2)
    assert {job.memory.rung for job in jobs.values() if job.memory} == {Rung.RESIDENT, last_rung(wide)}


def told(job: Job) -> str:
    """What its record says was done."""
    assert job.memory is not None
    kind, _, _ = job.id.partition("-")
    return f"{kind}: {' '.join(dict.fromkeys(each.measure for each in job.memory.relief))}"


def last_rung(report: MemoryReport) -> Rung:
    """Which the small one was on when it gave the job back."""
    return [Rung(each.measure) for each in report.relief if each.measure in set(Rung)][-1]
