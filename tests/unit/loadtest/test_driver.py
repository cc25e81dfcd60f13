"""What the driver sends, when, and what it makes of each answer: against a server that does what an order says."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import psutil
import pytest
from support.obedient_server import PICTURE, WAIT_S, obedient

from loadtest.driver import Progress, drive
from loadtest.samples import Arrival, Outcome, Sample
from serve.errors import OperatorError


def arrival(index: int, prompt: str, dialect: str = "wait", *, due_s: Any = 0.0, **extra: Any) -> Arrival:
    body = {"prompt": prompt, "negative_prompt": "", "seed": extra.pop("seed", index)}
    return Arrival(index=index, due_s=due_s, dialect=dialect, body=body, **extra)


def sent(url: str, arrivals: Sequence[Arrival], **options: Any) -> list[Sample]:
    return asyncio.run(drive(url, arrivals, **options))


def test_every_answer_is_told_for_what_it_is() -> None:
    wishes = {
        "picture": (Outcome.DONE, 200, ""),
        "moved": (Outcome.DONE, 200, ""),
        "refuse": (Outcome.REFUSED, 503, "queue_full"),
        "rude": (Outcome.REFUSED, 503, "queue_full, no Retry-After"),
        "invalid": (Outcome.INVALID, 422, "invalid"),
        "fail": (Outcome.FAILED, 500, "fail"),
        "job fails": (Outcome.FAILED, 200, "failed: out_of_memory"),
        "never": (Outcome.LATE, 0, "given up after 2 s"),
    }
    dialects = ("wait", "events", "poll", "embeddings", "openai", "a1111", "generate", "imagen")
    wanted = [(dialect, wish) for dialect in dialects for wish in wishes]
    arrivals = [
        arrival(index, wish, dialect, seed=202 if dialect == "imagen" else 0)
        for index, (dialect, wish) in enumerate(wanted)
    ]
    looks: list[Progress] = []
    with obedient() as server:
        samples = sent(server.url, arrivals, give_up_s=2.0, key="a-key", on_progress=looks.append)
        assert server.keys == {"Bearer a-key"}
        assert server.connections < sum(server.seen.values()), "no connection was kept alive"
    told = {(sample.dialect, wish): sample for sample, (_, wish) in zip(samples, wanted, strict=True)}
    for (dialect, wish), sample in told.items():
        if wish == "job fails" and dialect in ("embeddings", "generate"):
            continue  # nothing of the kind can happen there
        outcome, _, detail = wishes[wish]
        if (dialect, wish) == ("imagen", "job fails"):
            detail = "no"
        if dialect in ("openai", "a1111") and wish == "job fails":
            detail = "out_of_memory"
        assert (sample.outcome, sample.detail) == (outcome, detail), (dialect, wish, sample)
        if outcome is Outcome.DONE:
            assert sample.bytes == (0 if dialect == "embeddings" else len(PICTURE)), (dialect, wish)
        if dialect in ("openai", "a1111") and wish == "picture":
            assert sample.job is not None
            assert sample.job["timings"] == {"total_s": 1.0}, dialect
        if dialect in ("wait", "poll", "events") and wish in ("picture", "job fails"):
            assert sample.job is not None
            assert sample.job["timings"] == {"total_s": 1.0}, dialect
    assert told["embeddings", "picture"].job == {"cache": {"memory": 1, "redis": 0, "encoded": 0}, "truncated": []}
    assert told["wait", "refuse"].status == 503
    assert told["wait", "never"].status == 0
    last = looks[-1]
    assert (last.sent, last.under_way) == (len(arrivals), 0)
    assert last.done + last.refused + last.failed == len(arrivals)
    assert last.p50_s is not None


def test_a_stalled_server_does_not_slow_the_sending() -> None:
    """It answers nobody until all have come: a client who waits for answers would never send the last."""
    many = 40
    with obedient(together=many) as server:
        samples = sent(server.url, [arrival(i, "together", "generate", due_s=i / 100) for i in range(many)])
    assert {sample.outcome for sample in samples} == {Outcome.DONE}
    assert max(sample.sent_s for sample in samples) <= min(sample.ended_s for sample in samples)
    for index, sample in enumerate(samples):
        assert sample.due_s == index / 100
        assert sample.sent_s >= sample.due_s
        assert sample.latency_s == sample.ended_s - index / 100


def test_a_closed_loop_keeps_so_many_under_way_and_counts_from_the_sending() -> None:
    with obedient(together=3) as server:
        samples = sent(server.url, [arrival(i, "together", "generate", due_s=99.0) for i in range(9)], users=3)
        assert {sample.outcome for sample in samples} == {Outcome.DONE}
        under_way = max(sum(other.sent_s <= sample.sent_s < other.ended_s for other in samples) for sample in samples)
        assert under_way == 3
        assert all(sample.due_s <= sample.sent_s < 90 for sample in samples)
        none = sent(server.url, [arrival(0, "picture", "generate")], users=1, until_s=0.0)
        assert none == []


def test_a_user_who_was_refused_comes_again_when_the_server_said() -> None:
    with obedient() as server:
        arrivals = [arrival(0, "rude", "generate"), arrival(1, "refuse", "generate"), arrival(2, "picture", "generate")]
        samples = sent(server.url, arrivals, users=1, until_s=2.0)
    assert [sample.outcome for sample in samples] == [Outcome.REFUSED, Outcome.REFUSED]
    assert samples[1].sent_s - samples[0].ended_s >= 0.5
    assert not any(sample.hangs_up for sample in samples)


def test_a_stream_that_will_never_come_is_told_at_once() -> None:
    with obedient() as server:
        (gone,) = sent(server.url, [arrival(0, "no stream", "events")], give_up_s=30.0)
    assert (gone.outcome, gone.status, gone.detail) == (Outcome.INVALID, 404, "not_found")
    assert gone.latency_s < 15


def test_a_client_leaves_when_it_planned_to() -> None:
    with obedient() as server:
        arrivals = [
            arrival(0, "never", hang_up_s=0.2),
            arrival(1, "never", hang_up_s=0.3),
            arrival(2, "picture", hang_up_s=30.0),
        ]
        samples = sent(server.url, arrivals)
        assert server.left.acquire(timeout=10), "its connection is still open"
        assert server.left.acquire(timeout=10), "its connection is still open"
    assert [sample.outcome for sample in samples] == [Outcome.LEFT, Outcome.LEFT, Outcome.DONE]
    assert all(sample.hangs_up for sample in samples)
    assert samples[0].ended_s - samples[0].sent_s >= 0.2


def test_a_stream_that_was_cut_is_resumed_and_a_lost_connection_is_broken() -> None:
    with obedient() as server:
        samples = sent(
            server.url, [arrival(0, "cut", "events"), arrival(1, "hang up"), arrival(2, "hang up", "events")]
        )
        assert server.resumed_from == ["1-0"]
        assert server.seen["POST /v1/jobs"] == 3, "an order was sent twice"
    assert [sample.outcome for sample in samples] == [Outcome.DONE, Outcome.BROKEN, Outcome.BROKEN]
    assert samples[0].bytes == len(PICTURE)


def test_a_target_that_does_not_answer_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OperatorError, match=f"--target: no server answers at {url}"):
            sent(url, [arrival(0, "picture")])
    with pytest.raises(OperatorError, match="--target: "):
        sent("no address", [arrival(0, "picture")])


def test_a_run_that_is_cut_short_leaves_what_there_is_and_no_process() -> None:
    async def story(url: str) -> tuple[list[Sample], list[int]]:
        into: list[Sample] = []
        first = asyncio.Event()

        def look(progress: Progress) -> None:
            if progress.done == 1:
                first.set()

        arrivals = [arrival(0, "picture", "generate"), arrival(1, "never", "generate")]
        running = asyncio.create_task(drive(url, arrivals, on_progress=look, into=into))
        await asyncio.wait_for(first.wait(), 20)
        children = [child.pid for child in _drivers()]
        running.cancel()
        done, _ = await asyncio.wait({running}, timeout=WAIT_S / 2)
        assert done, "it waited for an answer"
        return into, children

    with obedient() as server:
        into, children = asyncio.run(story(server.url))
        assert server.left.acquire(timeout=10)
    assert [sample.index for sample in into] == [0]
    assert children
    assert not any(psutil.pid_exists(pid) for pid in children)


def test_it_ends_with_whoever_started_it() -> None:
    """Killed outright, the parent can end nothing itself."""
    script = (
        "import asyncio, sys; from loadtest.driver import drive; from loadtest.samples import Arrival;"
        "asyncio.run(drive(sys.argv[1], [Arrival(index=0, due_s=0, dialect='generate', body={'prompt': 'never'})]))"
    )
    with obedient() as server:
        parent = psutil.Popen([sys.executable, "-c", script, server.url])
        try:
            while not server.seen["POST /generate"]:
                assert parent.poll() is None
            children = parent.children(recursive=True)
        finally:
            parent.kill()
            parent.wait()
        assert server.left.acquire(timeout=10)
        _, alive = psutil.wait_procs(children, timeout=10)
    assert children
    assert not alive


def test_a_trace_that_can_t_be_sent_is_not_sent_again_and_again() -> None:
    """Locust runs a task that failed anew."""
    arrivals = [arrival(0, "picture", "generate"), arrival(1, "picture", "generate", due_s="soon")]
    with (
        obedient() as server,
        pytest.raises(OperatorError, match=r"the load's process ended \(exit code 1\): TypeError"),
    ):
        asyncio.run(asyncio.wait_for(drive(server.url, arrivals), 30))


def _drivers() -> list[psutil.Process]:
    here = psutil.Process(os.getpid()).children(recursive=True)
    return [child for child in here if "loadtest.sender.process" in child.cmdline()]


def test_the_dialects_that_a_workload_may_name_are_those_that_there_are() -> None:
    """In a process of its own: Locust patches the one that it is imported into."""
    code = "import loadtest.sender.users as u, loadtest.workload as w; assert tuple(u.DIALECTS) == w.DIALECTS"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
