"""Who keeps which embeddings, told over a real Redis."""

import asyncio
import time
from pathlib import Path

import pytest
import redis
from support.cache_node import UNIT, UNITS, Node, until

from serve.domain.text import CacheReport, Tier
from serve.embedded import EmbeddedRedis
from serve.encoders.census import REPORTS, SEEN, CacheCensus, CensusTaker, clear_all, read_census
from serve.encoders.redis_tier import ALL, PREFIX
from serve.errors import BackendUnavailable


def taker(node: Node, url: str, name: str) -> CensusTaker:
    made = CensusTaker(node.cache, url, name, tick_s=0.01)
    made.start()
    return made


async def census_with(url: str, processes: int) -> CacheCensus:
    async with asyncio.timeout(10):
        while True:
            census = await read_census(url)
            if len(census.processes) == processes:
                return census


def test_every_process_is_counted_until_it_closes(redis_url: str) -> None:
    async def main() -> None:
        nodes = [Node(redis_url), Node(redis_url, memory_bytes=1000)]
        await nodes[0].cache.get_many(UNITS[:2])
        await nodes[0].get()
        await nodes[1].get()
        takers = [taker(node, redis_url, name) for node, name in zip(nodes, ("b", "a"), strict=True)]
        census = await census_with(redis_url, 2)
        small, large = (each.report for each in census.processes)
        assert (small.place, small.name, large.name) == ("encoder", "a", "b")
        assert (large.entries, large.in_flight, large.redis) == (2, 0, "up")
        assert large.bytes == nodes[0].cache.stats().bytes
        assert (small.capacity, large.capacity) == (1000, nodes[0].cache.stats().capacity)
        assert large.hits == CacheReport(memory=1, encoded=2)
        assert small.hits == CacheReport(redis=1)
        assert abs(census.at - time.time()) < 5
        assert all(0 <= census.at - each.updated_at < 5 for each in census.processes)
        assert census.redis.keys >= 2
        assert census.redis.bytes > 0
        assert census.redis.hits >= 1
        assert census.redis.max_bytes == census.redis.evicted == 0
        await takers[0].close()
        assert [each.report.name for each in (await read_census(redis_url)).processes] == ["a"]
        await takers[1].close()
        assert (await read_census(redis_url)).processes == ()
        for node in nodes:
            await node.cache.close()

    asyncio.run(main())


def test_a_process_that_died_is_counted_no_more(redis_url: str) -> None:
    async def main() -> None:
        node = Node(redis_url)
        alive = taker(node, redis_url, "alive")
        with redis.Redis.from_url(redis_url) as client:
            client.hset(REPORTS, "dead", b'{"any":"thing"}')
            client.zadd(SEEN, {"dead": client.time()[0] - 11})
            client.hset(REPORTS, "foreign", b"another release's form")
            client.zadd(SEEN, {"foreign": client.time()[0]})
            assert [each.report.name for each in (await census_with(redis_url, 1)).processes] == ["alive"]
            await until(lambda: not client.hexists(REPORTS, "dead"))
            assert client.zscore(SEEN, "dead") is None
            assert client.ttl(REPORTS) > 0
            assert client.ttl(SEEN) > 0
        await alive.close()
        await node.cache.close()

    asyncio.run(main())


def test_clearing_empties_redis_and_every_memory(redis_url: str) -> None:
    async def main() -> None:
        nodes = [Node(redis_url), Node(redis_url)]
        for node in nodes:
            await node.cache.get_many(UNITS)
        takers = [taker(node, redis_url, "x") for node in nodes]
        await census_with(redis_url, 2)
        with redis.Redis.from_url(redis_url) as client:
            client.set("somebody else's", "value")
            client.set(f"{ALL}another release's", "value")
            client.mset({f"{PREFIX}{number}": b"v" for number in range(3000)})
            for others in (1, 0):
                assert await clear_all(redis_url) == 3000 + len(UNITS) + others
                assert list(client.scan_iter(f"{ALL}*")) == []
                await until(lambda: not any(node.cache.stats().entries for node in nodes))
                client.mset({f"{PREFIX}{number}": b"v" for number in range(3000)})
                for node in nodes:
                    assert {got.tier for got in (await node.cache.get_many(UNITS)).values()} <= {
                        Tier.ENCODED,
                        Tier.REDIS,
                    }
            assert client.get("somebody else's") == b"value"
        assert (await census_with(redis_url, 2)).processes
        for each in takers:
            await each.close()
        for node in nodes:
            await node.cache.close()

    asyncio.run(main())


def test_without_redis_it_is_silent_and_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        with EmbeddedRedis(tmp_path, "cache") as server:
            url = server.url
            node = Node(url)
            await node.get()
            counted = taker(node, url, "steady")
            await census_with(url, 1)
            server.kill()
            with pytest.raises(BackendUnavailable, match="the shared embedding cache does not answer"):
                await read_census(url)
            with pytest.raises(BackendUnavailable):
                await clear_all(url)
            assert (await node.get()).tier is Tier.MEMORY
            server.start()
            assert (await census_with(url, 1)).processes[0].report.name == "steady"
            server.kill()
            started = time.monotonic()
            await counted.close()
            assert time.monotonic() - started < 3
            await node.cache.close()

    asyncio.run(main())


def test_a_full_redis_still_says_when_to_forget(redis_url: str) -> None:
    async def main() -> None:
        node = Node(redis_url)
        await node.get()
        counted = taker(node, redis_url, "x")
        await census_with(redis_url, 1)
        with redis.Redis.from_url(redis_url) as client:
            policy = client.config_get("maxmemory-policy")
            await clear_all(redis_url)
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 1)
            try:
                await until(lambda: not node.cache.stats().entries)
            finally:
                client.config_set("maxmemory", 0)
                client.config_set("maxmemory-policy", policy["maxmemory-policy"])
        assert (await node.get(UNIT)).tier is Tier.ENCODED
        await counted.close()
        await node.cache.close()

    asyncio.run(main())


def test_a_server_without_redis_has_no_census() -> None:
    async def main() -> None:
        node = Node(None)
        idle = CensusTaker(node.cache, None, "alone")
        idle.start()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert node.cache.stats().redis == "off"
        await idle.close()
        await node.cache.close()

    asyncio.run(main())
