"""A scenario's row says that it failed until its test has passed to the end, and the recovery has its bound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.chaos_report import Row, Verdict, told_of, unlucky
from support.history import Accepted, Answer, Entry, Heard, Put, Transition

from serve.domain.jobs import JobState

QUEUED, ENCODING, SUCCEEDED, FAILED = JobState.QUEUED, JobState.ENCODING, JobState.SUCCEEDED, JobState.FAILED


def twice(recovered_at: float) -> list[Entry]:
    """One job that lost its first worker, and ran for a second under another."""
    times = ((0, QUEUED, 0), (1, ENCODING, 1), (3, QUEUED, 1), (recovered_at - 1, ENCODING, 2))
    return [
        Accepted(job="a"),
        *(
            Transition(job="a", state=state, step=0, attempt=n, fence=n, at=at, event=f"{round(1000 * at)}-0")
            for at, state, n in (*times, (recovered_at, SUCCEEDED, 2))
        ),
        Put(key="a/0.png", version="v", bytes=7),
        Put(key="a/manifest.json", version="v", bytes=7),
        Answer(job="a", state=SUCCEEDED, attempt=2, images={0: 7}),
    ]


def row(folder: Path) -> Row:
    (path,) = folder.glob("*.row.json")
    return Row(**json.loads(path.read_text(encoding="utf-8")))


def test_only_the_last_assertion_makes_a_row_good(tmp_path: Path) -> None:
    verdict = Verdict(1, "a fault", 5, tmp_path)
    assert row(tmp_path).failure == "it was broken off"
    verdict.of(3, twice(5.0))
    assert row(tmp_path).failure == "it was broken off"
    verdict.failed("AssertionError: assert 3 | 4\n  and more")
    assert (row(tmp_path).failure, row(tmp_path).jobs) == ("AssertionError: assert 3 / 4 and more", 1)
    assert "**1 of 1 scenarios FAILED.**" in told_of([row(tmp_path)])
    assert "seed 5" in told_of([row(tmp_path)])
    verdict.passed()
    assert (row(tmp_path).failure, row(tmp_path).runs) == (None, 3)
    assert "All 1 scenarios passed." in told_of([row(tmp_path)])


def test_what_is_lost_is_counted_before_the_verdict_is_given(tmp_path: Path) -> None:
    verdict = Verdict(1, "a fault", 5, tmp_path)
    with pytest.raises(AssertionError):
        verdict.of(1, [Accepted(job="a")])
    verdict.failed("")
    assert row(tmp_path).losses == 1


def test_a_recovery_takes_no_longer_than_lease_run_and_a_little(tmp_path: Path) -> None:
    verdict = Verdict(1, "a fault", 5, tmp_path)
    verdict.of(1, twice(9.0), lease_s=2.0)
    with pytest.raises(AssertionError):
        verdict.of(1, twice(9.1), lease_s=2.0)
    with pytest.raises(AssertionError, match="no claim was lost"):
        verdict.of(1, [], lease_s=2.0)


def test_who_lost_a_worker_each_time_is_counted_as_such(tmp_path: Path) -> None:
    failed = Answer(job="a", state=FAILED, attempt=3, error="worker_lost")
    assert unlucky([failed])
    assert not unlucky([failed, Heard(job="a", fence=2, what="failed")])
    assert not unlucky([Answer(job="a", state=FAILED, attempt=2, error="worker_lost")])
    told = told_of([Row(fault=1, what="a fault", ends={"failed": 2}, unlucky=1)])
    assert "2 failed (1 lost a worker in each attempt)" in told
