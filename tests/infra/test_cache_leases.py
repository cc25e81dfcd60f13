"""Single flight across processes: two caches, one Redis, one forward."""

import asyncio
import time
from collections.abc import Sequence

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cache_node import UNIT, UNITS, Node, commands, until
from support.slow_proxy import SlowProxy

from serve.domain.text import EncodeUnit, Tier
from serve.encoders.cache import Fetched
from serve.encoders.coalesce import Coalescer
from serve.encoders.redis_tier import LEASE_PREFIX
from serve.errors import BackendUnavailable


def leases(url: str) -> list[bytes]:
    with redis.Redis.from_url(url) as client:
        return list(client.scan_iter(f"{LEASE_PREFIX}*"))


async def close(*nodes: Node) -> None:
    for node in nodes:
        node.cache.check_integrity()
        await node.cache.close()


def test_two_processes_encode_once(redis_url: str) -> None:
    async def main() -> None:
        holder, follower = Node(redis_url, b"1", leases=30.0), Node(redis_url, b"2", leases=30.0)
        holder.gate.clear()
        first = asyncio.create_task(holder.get())
        await holder.calls.acquire()
        second = asyncio.create_task(follower.get())
        with redis.Redis.from_url(redis_url) as client:
            client.config_resetstat()
        await until(lambda: commands(redis_url).get("mget", 0) > 3)  # it looks, and looks again
        assert follower.encoded == []
        holder.gate.set()
        values = await asyncio.gather(first, second)
        assert values[0].value == values[1].value
        assert [got.tier for got in values] == [Tier.ENCODED, Tier.REDIS]
        assert (await follower.get()).tier is Tier.MEMORY
        assert follower.encoded == []
        await until(lambda: leases(redis_url) == [])
        await close(holder, follower)

    asyncio.run(main())


def test_a_call_encodes_its_share_while_it_waits_for_the_rest(redis_url: str) -> None:
    """Two processes want overlapping units in opposite order: neither waits for the other before it works."""

    async def main() -> None:
        one, two = Node(redis_url, b"1", leases=30.0), Node(redis_url, b"2", leases=30.0)
        one.gate.clear()
        two.gate.clear()
        first = asyncio.create_task(one.cache.get_many(UNITS[:2]))
        await one.calls.acquire()
        second = asyncio.create_task(two.cache.get_many(UNITS[1:3]))
        await two.calls.acquire()
        assert (one.encoded, two.encoded) == (UNITS[:2], UNITS[2:3])
        two.gate.set()
        one.gate.set()
        got = await asyncio.gather(first, second)
        assert got[0][UNITS[1].key].value == got[1][UNITS[1].key].value
        await close(one, two)

    asyncio.run(main())


def test_the_lease_of_a_dead_holder_runs_out(redis_url: str) -> None:
    async def main() -> None:
        holder, follower = Node(redis_url, leases=0.4), Node(redis_url, leases=0.4)
        holder.gate.clear()
        stuck = asyncio.create_task(holder.get())
        await holder.calls.acquire()
        started = time.monotonic()
        assert (await follower.get()).tier is Tier.ENCODED
        assert 0.2 < time.monotonic() - started < 2.0
        holder.gate.set()
        assert (await stuck).value == (await follower.get()).value
        await close(holder, follower)

    asyncio.run(main())


def test_nobody_waits_longer_than_one_lease(redis_url: str) -> None:
    async def main() -> None:
        with redis.Redis.from_url(redis_url) as client:
            client.set(LEASE_PREFIX + UNIT.key, "a holder with another setting")
        node = Node(redis_url, leases=0.3)
        started = time.monotonic()
        assert (await node.get()).tier is Tier.ENCODED
        assert 0.25 < time.monotonic() - started < 3.0
        await close(node)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["failed", "cancelled"])
def test_a_lease_that_bore_nothing_is_given_back(redis_url: str, how: str) -> None:
    async def main() -> None:
        holder, follower = Node(redis_url, leases=60.0), Node(redis_url, leases=60.0)
        holder.gate.clear()
        holder.error = BackendUnavailable("away")
        first = asyncio.create_task(holder.get())
        await holder.calls.acquire()
        second = asyncio.create_task(follower.get())
        await asyncio.sleep(0)
        if how == "cancelled":
            first.cancel()
        else:
            holder.gate.set()
        with pytest.raises(BackendUnavailable if how == "failed" else asyncio.CancelledError):
            await first
        assert (await second).tier is Tier.ENCODED
        assert follower.encoded == [UNIT]
        await until(lambda: leases(redis_url) == [])
        await close(holder, follower)

    asyncio.run(main())


def test_who_leaves_while_the_claim_is_under_way_leaves_no_lease(redis_url: str) -> None:
    async def main() -> None:
        async with SlowProxy(redis_url) as proxy:
            node = Node(proxy.url, leases=60.0, timeout_s=5.0)
            proxy.delay_s = 0.1
            leaving = asyncio.create_task(node.get())
            await until(lambda: len(leases(redis_url)) == 1)  # Redis has given it, and the answer is on its way
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert node.encoded == []
            await until(lambda: leases(redis_url) == [])
            assert (await node.get()).tier is Tier.ENCODED
            await close(node)

    asyncio.run(main())


def test_a_text_that_is_given_up_during_a_claim_gives_its_lease_back_alone(redis_url: str) -> None:
    async def main() -> None:
        async with SlowProxy(redis_url) as proxy:
            node = Node(proxy.url, leases=60.0, timeout_s=5.0, by_row=True)
            node.gate.clear()
            proxy.delay_s = 0.1
            leaving = asyncio.create_task(node.cache.get_many(UNITS[:2]))
            staying = asyncio.create_task(node.get())
            await until(lambda: len(leases(redis_url)) == 2)
            leaving.cancel()
            await node.calls.acquire()
            await until(lambda: leases(redis_url) == [LEASE_PREFIX.encode() + UNIT.key.encode()])
            node.gate.set()
            assert (await staying).tier is Tier.ENCODED
            assert node.encoded == [UNIT]
            await until(lambda: leases(redis_url) == [])
            await close(node)

    asyncio.run(main())


def test_texts_that_are_encoded_by_themselves_are_claimed_together(redis_url: str) -> None:
    async def main() -> None:
        node = Node(redis_url, leases=30.0, by_row=True)
        with redis.Redis.from_url(redis_url) as client:
            client.config_resetstat()
        await node.cache.get_many(UNITS)
        assert sorted(unit.token_ids for unit in node.encoded) == sorted(unit.token_ids for unit in UNITS)
        await until(lambda: leases(redis_url) == [])
        assert commands(redis_url)["mget"] == 2  # a look, a claim
        await close(node)

    asyncio.run(main())


def test_texts_that_are_encoded_by_themselves_share_a_batch(redis_url: str) -> None:
    async def main() -> None:
        batches: list[list[EncodeUnit]] = []

        def forward(batch: list[EncodeUnit]) -> list[Fetched]:
            batches.append(batch)
            return [Fetched(unit.key.encode(), Tier.ENCODED) for unit in batch]

        queue = Coalescer(forward, length=lambda _: 1, max_batch_size=8, max_batch_tokens=8)

        class Queued(Node):
            async def encode(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
                return await queue.submit_all(units)

        node = Queued(redis_url, leases=30.0, by_row=True)
        await node.cache.get_many(UNITS)
        assert batches == [UNITS]
        await queue.close()
        await close(node)

    asyncio.run(main())


def test_a_redis_that_goes_away_ends_the_wait(redis_url: str) -> None:
    async def main() -> None:
        holder = Node(redis_url, leases=60.0)
        holder.gate.clear()
        first = asyncio.create_task(holder.get())
        await holder.calls.acquire()
        async with SlowProxy(redis_url) as proxy:
            follower = Node(proxy.url, leases=60.0)
            second = asyncio.create_task(follower.get())
            answers = proxy.answers
            await until(lambda: proxy.answers > answers + 3)
            await proxy.cut()
            assert (await second).tier is Tier.ENCODED
            holder.gate.set()
            await first
            await close(holder, follower)

    asyncio.run(main())


def test_a_failure_is_told_though_another_unit_is_still_awaited(redis_url: str) -> None:
    async def main() -> None:
        holder, follower = Node(redis_url, leases=60.0), Node(redis_url, leases=60.0)
        holder.gate.clear()
        first = asyncio.create_task(holder.get())
        await holder.calls.acquire()
        follower.error = BackendUnavailable("away")
        started = time.monotonic()
        with pytest.raises(BackendUnavailable):
            await follower.cache.get_many(UNITS[:2])
        assert time.monotonic() - started < 10
        holder.gate.set()
        await first
        await close(holder, follower)

    asyncio.run(main())


def test_a_follower_that_leaves_leaves_nothing_behind(redis_url: str) -> None:
    async def main() -> None:
        holder, follower = Node(redis_url, leases=60.0), Node(redis_url, leases=60.0)
        holder.gate.clear()
        first = asyncio.create_task(holder.get())
        await holder.calls.acquire()
        second = asyncio.create_task(follower.get())
        await asyncio.sleep(0.02)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert follower.cache.stats().in_flight == 0
        assert len(leases(redis_url)) == 1
        holder.gate.set()
        await first
        await close(holder, follower)

    asyncio.run(main())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.sampled_from(UNITS), min_size=1, max_size=4)), max_size=10),
    st.booleans(),
)
def test_any_crowd_encodes_each_unit_once(redis_url: str, calls: list[tuple[int, list]], by_row: bool) -> None:
    """Three processes ask at the same time for any mix: one forward per unit in all, and one value."""

    async def main() -> None:
        with redis.Redis.from_url(redis_url) as client:
            client.flushall()
        nodes = [Node(redis_url, mark, leases=30.0, by_row=by_row) for mark in (b"0", b"1", b"2")]
        results = await asyncio.gather(*(nodes[index].cache.get_many(wanted) for index, wanted in calls))
        encoded = [unit for node in nodes for unit in node.encoded]
        assert len(encoded) == len(set(encoded)) == len({unit for _, wanted in calls for unit in wanted})
        values: dict[str, bytes] = {}
        for result in results:
            for key, got in result.items():
                assert values.setdefault(key, got.value) == got.value
        await close(*nodes)

    asyncio.run(main())
