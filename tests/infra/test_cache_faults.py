"""The cache Redis slow, gone, full, flushed and wrong, under load: it costs time once, and never a value."""

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import redis
from support.cache_node import UNIT, UNITS, Node, until
from support.slow_proxy import SlowProxy

from serve.domain.text import EncodeUnit, Tier
from serve.embedded import EmbeddedRedis
from serve.encoders.breaker import Breaker, BreakerState
from serve.encoders.cache import Fetched
from serve.encoders.redis_tier import PREFIX

MANY = [EncodeUnit("encoder", (number, 1)) for number in range(200)]
MORE = [EncodeUnit("encoder", (number, 2)) for number in range(600)]


async def timed(node: Node, unit: EncodeUnit) -> float:
    started = time.monotonic()
    assert (await node.get(unit)).tier is Tier.ENCODED
    return time.monotonic() - started


def breaker_open(node: Node) -> float:
    return node.metrics.value("tandem_cache_breaker_open")


def test_a_crowd_pays_one_timeout_for_a_slow_redis(redis_url: str) -> None:
    """500 ms a round trip, 200 requests at once, each of which would read and write, and then one after another."""

    async def main() -> None:
        async with SlowProxy(redis_url) as proxy:
            proxy.delay_s = 0.5
            node = Node(proxy.url, memory_bytes=0, timeout_s=0.25, pause_s=60.0)
            started = time.monotonic()
            crowd = await asyncio.gather(*(timed(node, unit) for unit in MANY))
            assert time.monotonic() - started < 0.25 + 1.0  # in seven turns of 32 they would take 1.75
            assert min(crowd) > 0.2
            assert node.errors("timeout") == 1
            assert breaker_open(node) == 1
            assert node.cache.stats().redis == "away"
            started = time.monotonic()
            for unit in MANY:
                await timed(node, unit)
            assert time.monotonic() - started < 0.25
            assert sorted(unit.token_ids for unit in node.encoded) == sorted(unit.token_ids for unit in MANY * 2)
            await node.cache.close()

    asyncio.run(main())


def test_who_comes_late_to_an_outage_leaves_with_the_first(redis_url: str) -> None:
    async def main() -> None:
        async with SlowProxy(redis_url) as proxy:
            proxy.delay_s = 5.0
            node = Node(proxy.url, memory_bytes=0, timeout_s=0.4, pause_s=60.0)
            first = asyncio.create_task(timed(node, UNITS[0]))
            await asyncio.sleep(0.3)
            assert await timed(node, UNITS[1]) < 0.3
            assert 0.35 < await first < 0.7
            await node.cache.close()

    asyncio.run(main())


def test_what_another_process_found_out_is_not_waited_for_again(redis_url: str) -> None:
    """The replica that asks has waited for Redis already; the pool that it asks believes it."""

    async def main() -> None:
        async with SlowProxy(redis_url) as proxy:
            node = Node(proxy.url, memory_bytes=0, timeout_s=0.25, pause_s=60.0)
            await node.get()
            answered = time.monotonic()
            proxy.delay_s = 5.0
            await until(lambda: time.monotonic() - answered > 0.25)
            node.cache.hear_redis_away()
            assert node.cache.redis_away
            assert breaker_open(node) == 1
            assert await timed(node, UNITS[1]) < 0.2
            await node.cache.close()

    asyncio.run(main())


def test_what_redis_says_itself_counts_for_more_than_what_another_says_of_it(redis_url: str) -> None:
    async def main() -> None:
        node = Node(redis_url, memory_bytes=0, timeout_s=30.0)
        await node.get()
        node.cache.hear_redis_away()
        assert not node.cache.redis_away
        assert (await node.get()).tier is Tier.REDIS
        await node.cache.close()

    asyncio.run(main())


def test_an_outage_is_no_news_once_the_pause_is_over(redis_url: str) -> None:
    """Nobody asks this process for anything, so that none of its calls finds out that Redis is back."""

    async def main() -> None:
        async with SlowProxy(redis_url) as proxy:
            node = Node(proxy.url, memory_bytes=0, pause_s=0.5)
            await proxy.cut()
            await node.get()
            assert node.cache.redis_away
            assert node.cache.stats().redis == "away"
            assert breaker_open(node) == 1
            await until(lambda: not node.cache.redis_away)
            assert node.cache.stats().redis == "up"
            assert breaker_open(node) == 0
            await node.cache.close()

    asyncio.run(main())


def test_a_probe_costs_one_timeout_on_the_whole_way(redis_url: str) -> None:
    """The replica that asks finds Redis still away; the pool, whose pause ends at the same time, need not try too."""

    async def main() -> None:
        async with SlowProxy(redis_url) as proxy:
            proxy.delay_s = 5.0
            pool = Node(proxy.url, memory_bytes=0, timeout_s=0.1, pause_s=0.3)

            class Front(Node):
                async def encode(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
                    if self.cache.redis_away:
                        pool.cache.hear_redis_away()
                    return list((await pool.cache.get_many(units)).values())

            front = Front(proxy.url, write_through=False, memory_bytes=0, timeout_s=0.1, pause_s=0.3)
            for outage in range(1, 4):
                assert (await front.get()).tier is Tier.ENCODED
                assert (front.errors("timeout"), pool.errors("timeout")) == (outage, 0)
                over = time.monotonic() + 0.35
                await until(lambda over=over: time.monotonic() > over)
            await asyncio.gather(front.cache.close(), pool.cache.close())

    asyncio.run(main())


def test_a_probe_is_paid_for_by_one_request(redis_url: str) -> None:
    async def main() -> None:
        async with SlowProxy(redis_url) as proxy:
            node = Node(proxy.url, memory_bytes=0, timeout_s=0.25, pause_s=0.0)
            await node.get()
            proxy.delay_s = 0.5
            await timed(node, UNIT)  # opens the breaker, and with a pause of 0 the next call is a probe
            took = sorted(await asyncio.gather(*(timed(node, unit) for unit in MANY)))
            assert took[-1] > 0.2
            assert took[-2] < 0.2
            assert node.errors("timeout") >= 2
            proxy.delay_s = 0.0
            assert (await node.get(UNITS[1])).tier is Tier.ENCODED
            assert breaker_open(node) == 0
            assert node.cache.stats().redis == "up"
            assert (await node.get(UNITS[1])).tier is Tier.REDIS
            await node.cache.close()

    asyncio.run(main())


def test_a_probe_decides_though_its_caller_has_left(redis_url: str) -> None:
    async def main() -> None:
        async with SlowProxy(redis_url) as proxy:
            node = Node(proxy.url, memory_bytes=0, timeout_s=1.0, pause_s=0.0)
            await node.get()
            await proxy.cut()
            assert (await node.get()).tier is Tier.ENCODED
            await proxy.mend()
            proxy.delay_s = 0.1
            answers = proxy.answers
            probe = asyncio.create_task(node.get())
            await until(lambda: proxy.answers > answers)
            probe.cancel()
            await asyncio.gather(probe, return_exceptions=True)
            assert (await node.get()).tier is Tier.ENCODED  # there is one probe at a time
            async with asyncio.timeout(10):
                while (await node.get()).tier is not Tier.REDIS:  # noqa: ASYNC110  the answer is on its way
                    await asyncio.sleep(0.001)
            assert breaker_open(node) == 0
            await node.cache.close()

    asyncio.run(main())


def test_a_crowd_at_a_healthy_redis_is_no_outage(redis_url: str) -> None:
    """800 requests that Redis answers in 60 ms each, 32 at a time: those without a turn go on without it, no more."""

    async def main() -> None:
        async with SlowProxy(redis_url) as proxy:
            writer, reader = Node(redis_url), Node(proxy.url, memory_bytes=0, timeout_s=1.0)
            await writer.cache.get_many(MANY + MORE)
            proxy.delay_s = 0.06
            got = await asyncio.gather(*(reader.get(unit) for unit in MANY + MORE))
            tiers = [each.tier for each in got]
            assert tiers.count(Tier.REDIS) > 32
            assert reader.errors("crowded") > 0
            assert reader.errors("timeout") == reader.errors("down") == breaker_open(reader) == 0
            proxy.delay_s = 0.0
            assert (await reader.get()).tier is Tier.ENCODED
            assert (await reader.get()).tier is Tier.REDIS
            await asyncio.gather(writer.cache.close(), reader.cache.close())

    asyncio.run(main())


def test_a_flipped_bit_on_the_way_is_a_miss(redis_url: str) -> None:
    async def main() -> None:
        async with SlowProxy(redis_url) as proxy:
            node, reader = Node(proxy.url, bytes(500)), Node(proxy.url, b"other", memory_bytes=0)
            true = await node.get()
            proxy.flip = 500
            got = await reader.get()
            assert got.tier is Tier.ENCODED
            assert got.value == UNIT.key.encode() + b"other"
            assert reader.errors("corrupt") >= 1
            assert breaker_open(reader) == 0
            assert true.value != got.value
            await asyncio.gather(node.cache.close(), reader.cache.close())

    asyncio.run(main())


def test_no_request_fails_while_redis_comes_and_goes(tmp_path: Path) -> None:
    """Redis is killed, filled, flushed, spoiled and slowed in mid-load: 8 clients see only true values."""
    values: dict[str, set[bytes]] = {}

    class Load(Node):
        async def encode(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
            fetched = await super().encode(units)
            for unit, got in zip(units, fetched, strict=True):
                values.setdefault(unit.key, set()).add(got.value)
            return fetched

    async def client(node: Node, seed: int, done: asyncio.Event) -> list[float]:
        choice, took = random.Random(seed), []
        while not done.is_set():
            wanted = choice.sample(MANY, 3)
            started = time.monotonic()
            got = await node.cache.get_many(wanted)
            took.append(time.monotonic() - started)
            for unit in wanted:
                assert got[unit.key].value in values[unit.key]
            await asyncio.sleep(0.001)
        return took

    def spoil(url: str) -> None:
        with redis.Redis.from_url(url) as direct:
            for key in direct.scan_iter(f"{PREFIX}*"):
                direct.setrange(key, 30, b"rot")

    async def mishaps(server: EmbeddedRedis, proxy: SlowProxy, nodes: list[Load]) -> None:
        async def felt(kind: str) -> None:
            before = sum(node.errors(kind) for node in nodes)
            await until(lambda: sum(node.errors(kind) for node in nodes) > before)

        async def at_work() -> None:
            """Every process reads from Redis, again."""
            before = [node.cache.stats().hits.redis for node in nodes]
            await until(
                lambda: all(node.cache.stats().hits.redis > hits for node, hits in zip(nodes, before, strict=True))
            )

        for _ in range(3):
            await at_work()
            with redis.Redis.from_url(server.url) as direct:
                async with asyncio.TaskGroup() as group:
                    group.create_task(felt("corrupt"))
                    await asyncio.to_thread(spoil, server.url)
                direct.flushall()
                await at_work()
                direct.config_set("maxmemory-policy", "noeviction")
                direct.config_set("maxmemory", 1)
                direct.flushall()
                await felt("full")
                direct.config_set("maxmemory", 0)
            proxy.delay_s = 0.5
            await felt("timeout")
            proxy.delay_s = 0.0
            await at_work()
            await asyncio.to_thread(server.kill)
            await felt("down")
            await asyncio.to_thread(server.start)

    async def main() -> None:
        with EmbeddedRedis(tmp_path, "cache") as server:
            async with SlowProxy(server.url) as proxy:
                nodes = [Load(proxy.url, mark, memory_bytes=3000, timeout_s=0.1, pause_s=0.1) for mark in (b"1", b"2")]
                done = asyncio.Event()
                clients = [asyncio.create_task(client(node, seed, done)) for seed, node in enumerate(nodes * 4)]
                await mishaps(server, proxy, nodes)
                done.set()
                took = sorted(each for times in await asyncio.gather(*clients) for each in times)
                assert len(took) > 100
                assert took[int(len(took) * 0.99)] < 1.0  # the timeout, and a busy machine's share
                for node in nodes:
                    hits = node.cache.stats().hits
                    assert min(hits.memory, hits.redis, hits.encoded) > 0
                    node.cache.check_integrity()
                    await node.cache.close()

    asyncio.run(main())


def test_a_breaker_in_all_its_states() -> None:
    told: list[BreakerState] = []
    breaker = Breaker(0.0, told.append)
    slow = breaker.enter()
    first = breaker.enter()
    assert slow is not None
    assert first is not None
    breaker.succeeded(first)
    assert breaker.state is BreakerState.CLOSED
    assert breaker.failed(first)
    assert not breaker.failed(slow)  # it opened for both
    probe = breaker.enter()
    assert probe is not None
    assert breaker.enter() is None
    breaker.succeeded(slow)  # an answer to an old question
    assert breaker.state is BreakerState.HALF_OPEN
    breaker.gave_up(probe)
    again = breaker.enter()
    assert again is not None
    assert breaker.failed(again)
    last = breaker.enter()
    assert last is not None
    breaker.succeeded(last)
    closed, opened, half = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
    assert told == [opened, half, opened, half, opened, half, closed]
    assert not breaker.resting


def test_a_breaker_rests_as_long_as_anyone_says(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    breaker = Breaker(5.0, lambda _: None)
    ticket = breaker.enter()
    assert ticket is not None
    assert breaker.failed(ticket)
    assert breaker.resting
    assert breaker.enter() is None
    now = 104.0
    assert not breaker.trip()  # it was open
    now = 108.0
    assert breaker.resting
    now = 109.0
    assert not breaker.resting
    probe = breaker.enter()
    assert probe is not None
    assert not breaker.trip()  # the probe decides
    breaker.succeeded(probe)
    assert breaker.trip()
    assert breaker.resting
