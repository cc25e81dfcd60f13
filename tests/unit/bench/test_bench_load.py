import asyncio
import time

import pytest

from serve.bench.load import latency, open_loop, saturate, steady_rate


def test_open_loop_does_not_wait_for_answers() -> None:
    """Ten requests that are due within 90 ms are all under way before the first is answered."""
    under_way, most = 0, 0
    release = asyncio.Event()

    async def send(index: int) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if most == 10:
            release.set()
        await release.wait()
        under_way -= 1

    samples = asyncio.run(open_loop(send, [0.01 * number for number in range(10)]))
    assert most == 10
    assert all(sample.error is None for sample in samples)


def test_latency_counts_from_the_time_at_which_a_request_was_due() -> None:
    """The first request stalls this very process for 0.2 s: those that were due meanwhile are late, and it shows."""

    async def send(index: int) -> None:
        if index == 0:
            time.sleep(0.2)  # noqa: ASYNC251 -- the stall is the point

    first, second = asyncio.run(open_loop(send, [0.0, 0.05]))
    assert first.seconds >= 0.2
    assert second.seconds >= 0.14


def test_failures_are_counted_by_reason_and_have_no_latency() -> None:
    async def send(index: int) -> None:
        if index % 2:
            raise ConnectionError("gone")

    samples = asyncio.run(open_loop(send, [0.0] * 5))
    told = latency("clip-l", 0.5, 10.0, samples)
    assert told.failed == {"ConnectionError: gone": 2}
    assert told.seconds is not None
    assert told.seconds.count == 3


def test_where_everything_fails_there_is_no_latency() -> None:
    async def send(_: int) -> None:
        raise ConnectionError("gone")

    told = latency("clip-l", 0.5, 10.0, asyncio.run(open_loop(send, [0.0, 0.0])))
    assert told.seconds is None
    assert told.failed == {"ConnectionError: gone": 2}


def test_saturation_finds_the_rate_of_a_server_with_a_known_one() -> None:
    """One request at a time, 10 ms each: at most 100 a second, whatever the concurrency."""

    async def main() -> float:
        lock = asyncio.Lock()

        async def send(_: int) -> None:
            async with lock:
                await asyncio.sleep(0.01)

        return await saturate(send, concurrency=4, seconds=0.5)

    assert 50 < asyncio.run(main()) <= 100


def test_saturation_sends_every_number_once() -> None:
    sent: list[int] = []

    async def send(index: int) -> None:
        sent.append(index)
        await asyncio.sleep(0.001)

    asyncio.run(saturate(send, concurrency=8, seconds=0.1))
    assert len(sent) == len(set(sent))


def test_a_rate_counts_answers_after_the_first() -> None:
    assert steady_rate([1.0, 1.5, 2.0]) == 2.0
    with pytest.raises(ValueError):
        steady_rate([1.0, 1.0])
