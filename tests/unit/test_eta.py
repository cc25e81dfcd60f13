"""The prediction of a job's end, against the model that it states, simulated in small steps."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.jobs.eta import DEFAULT_ROWS, Load, eta_s
from serve.jobs.terms import Crew, WorkerReport

JOBS = st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 8)), max_size=12)


def a_crew(workers: int, rows: int, pace: float = 1.0) -> Crew:
    return Crew(
        tuple(
            WorkerReport(
                name=str(n), model="m", placement="p", max_pixels=1, max_rows=rows, batch=8, vae_factor=8, pace=pace
            )
            for n in range(workers)
        )
    )


def flat(jobs: list[tuple[int, int]]) -> list[int]:
    return [part for job in jobs for part in job]


def simulated(jobs: list[tuple[float, int]], watched: int, held: int, workers: int, rows: int) -> float:
    """Step by step from end to end: every image in hand gets the same share of the workers, an image one at most."""
    left = [(cost / images, images) for cost, images in jobs]
    inside: dict[int, float] = {}
    entered, now = 0, 0.0
    while True:
        while entered < len(left):
            images = sum(left[job][1] for job in inside)
            if entered >= held and images and images + left[entered][1] > rows:
                break
            inside[entered] = left[entered][0]
            entered += 1
        images = sum(left[job][1] for job in inside)
        share = min(1.0, workers / images)
        first = min(inside, key=lambda job: (inside[job], job))
        spent = inside[first]
        now += spent / share
        inside = {job: rest - spent for job, rest in inside.items()}
        del inside[first]
        if first == watched:
            return now


@given(held=JOBS, ahead=JOBS, behind=JOBS, own=st.tuples(st.integers(1, 5000), st.integers(1, 8)), data=st.data())
def test_the_end_of_a_queued_job_is_that_of_the_model(
    held: list[tuple[int, int]],
    ahead: list[tuple[int, int]],
    behind: list[tuple[int, int]],
    own: tuple[int, int],
    data: Any,
) -> None:
    workers, rows = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 16))
    standing = [len(ahead) + 1, flat(ahead), flat(behind), flat(held)]
    told = eta_s(Load(own[0], own[1]), standing, a_crew(workers, rows))
    jobs = [(float(cost), images) for cost, images in [*held, *ahead, own, *behind]]
    expected = simulated(jobs, len(held) + len(ahead), len(held), workers, workers * rows)
    assert told == pytest.approx(expected / 1000, rel=1e-6)


def test_alone_it_takes_what_an_idle_replica_takes() -> None:
    assert eta_s(Load(100, 1, alone_ms=400), [1, [], [], []], a_crew(2, 8)) == pytest.approx(0.4)


def test_a_pace_stretches_everything() -> None:
    quick, slow = (eta_s(Load(100, 1), [2, [300, 1], [], []], a_crew(1, 1, pace)) for pace in (1.0, 2.5))
    assert (quick, slow) == (pytest.approx(0.4), pytest.approx(1.0))


def test_what_is_behind_matters_only_as_far_as_it_shares_the_rows() -> None:
    behind = [1000, 1] * 20
    first = eta_s(Load(1000, 1), [1, [], behind, []], a_crew(1, 4))
    assert first == pytest.approx(4.0)


def test_without_a_report_one_worker_is_assumed() -> None:
    assert eta_s(Load(1000, 1), [1, [1000, 1] * (DEFAULT_ROWS - 1), [], []], Crew()) == pytest.approx(DEFAULT_ROWS)
