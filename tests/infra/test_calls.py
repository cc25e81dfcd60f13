"""Synchronous calls of several jobs, as the job store keeps them for every process of the server."""

import time

from support.jobs import Bench, a_preview, on

from serve.jobs.calls import Call, Part, started_now

FIRST, SECOND = Part(0, 0, 0, "a" * 32, 0.5), Part(1, 0, 0, "b" * 32, 0.5)


def a_call(name: str = "a task", started_at: float = 1.0) -> Call:
    return Call(id=name, rounds=2, stages=1, started_at=started_at)


def test_a_call_is_what_was_said_of_it(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        store = bench.store
        await store.begin_call("me", a_call(), 60)
        assert await store.add_part("me", "a task", SECOND)
        assert await store.add_part("me", "a task", FIRST)
        found = await store.call("me", "a task")
        assert found is not None
        assert (found.parts, found.rounds, found.started_at) == ((FIRST, SECOND), 2, 1.0)
        assert not (found.ended)
        assert not (found.interrupted)
        assert not (found.stopped)
        assert await store.calls("me") == (found,)
        assert await store.call("you", "a task") is None
        assert await store.calls("you") == ()
        assert await store.stop_call("you", "a task") is None

    on(redis_url, story)


def test_what_is_to_end_is_told_to_whoever_adds_to_it(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        store = bench.store
        await store.begin_call("", a_call(), 60)
        assert await store.add_part("", "a task", FIRST)
        told = await store.stop_call("", "a task", 1)
        assert told is not None
        assert (told.parts, told.stopped, told.interrupted) == ((FIRST,), {1}, False)
        assert told.stops(1)
        assert not told.stops(0)
        assert not await store.add_part("", "a task", SECOND)
        assert await store.add_part("", "a task", FIRST)
        told = await store.stop_call("", "a task")
        assert told is not None
        assert told.interrupted
        assert set(told.parts) == {FIRST, SECOND}  # it was submitted all the same: somebody has to cancel it
        assert not await store.add_part("", "a task", FIRST)

    on(redis_url, story)


def test_calls_are_told_from_the_newest_without_those_that_ended(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        store = bench.store
        for at, name in enumerate(("old", "ended", "new", "short")):
            await store.begin_call("", a_call(name, started_at=float(at)), 0.02 if name == "short" else 60)
        await store.end_call("", "ended")
        assert (await store.call("", "ended")).ended  # type: ignore[union-attr]
        deadline = time.monotonic() + 5
        while await store.call("", "short") is not None:
            assert time.monotonic() < deadline
        assert [call.id for call in await store.calls("")] == ["new", "old"]
        assert await store._redis.zcard("tandem:calls:") == 2
        again = a_call("old", started_at=9.0)
        await store.add_part("", "old", FIRST)
        await store.begin_call("", again, 60)
        assert (await store.calls(""))[0] == again  # nothing is left of the former one

    on(redis_url, story)


def test_nothing_that_a_client_wrote_is_in_a_key(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        name = "*:\x00\ud800/../" + "x" * 1000
        await bench.store.begin_call("me", started_now("plain", 1, 1), 60)
        await bench.store.begin_call("me", a_call(name), 60)
        keys = [key.decode() for key in await bench.store._redis.keys("tandem:call*")]
        assert len(keys) == 3
        assert all(len(key) < 60 and key.isascii() for key in keys)

    on(redis_url, story)


def test_a_preview_is_the_latest_and_numbered(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        assert await bench.store.latest_preview("a") is None
        claim = await bench.claimed("a", steps=10)
        numbers = []
        for step in (2, 4):
            await bench.store.preview(claim, a_preview(0, step, 10, b"%d" % step))
            found = await bench.store.latest_preview("a")
            assert found is not None
            assert found[1] == b"%d" % step
            numbers.append(found[0])
        assert numbers[0] < numbers[1] < 2**53
        await bench.succeed(claim)
        assert await bench.store.latest_preview("a") is None

    on(redis_url, story)
