"""The embedding cache on a real Redis: shared, checked, and never in the way."""

import asyncio
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pytest
import redis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cache_node import UNIT, UNITS, Node, commands, stored, until
from support.slow_proxy import SlowProxy

from serve.domain.text import EncodeUnit, Tier
from serve.embedded import EmbeddedRedis
from serve.encoders.cache import Fetched
from serve.encoders.codec import pack, unpack
from serve.encoders.redis_tier import MAGIC, PREFIX, seal, unseal
from serve.settings.stores import CacheSettings


def test_what_one_encoded_another_reads_bit_for_bit(redis_url: str) -> None:
    async def main() -> None:
        writer, reader = Node(redis_url, b"w"), Node(redis_url, b"r")
        first = await writer.get()
        second = await reader.get()
        assert (first.tier, second.tier) == (Tier.ENCODED, Tier.REDIS)
        assert first.value == second.value
        assert (await reader.get()).tier is Tier.MEMORY
        assert reader.encoded == []
        sealed = stored(redis_url)
        assert sealed is not None
        assert sealed.startswith(MAGIC)
        assert unseal(UNIT.key, sealed) == first.value
        with redis.Redis.from_url(redis_url) as client:
            assert 0 < client.ttl(PREFIX + UNIT.key) <= CacheSettings().ttl_s
        await asyncio.gather(writer.cache.close(), reader.cache.close())

    asyncio.run(main())


def test_only_a_write_through_cache_writes(redis_url: str) -> None:
    async def main() -> None:
        reader = Node(redis_url, write_through=False)
        assert (await reader.get()).tier is Tier.ENCODED
        assert stored(redis_url) is None
        await reader.cache.close()

    asyncio.run(main())


def test_two_encoders_at_once_use_the_same_bits(redis_url: str) -> None:
    """Both miss, both encode; the first to store wins, and the other uses what the first stored."""

    async def main() -> None:
        both_miss = asyncio.Barrier(2)

        class Slow(Node):
            async def encode(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
                await both_miss.wait()
                return await super().encode(units)

        nodes = [Slow(redis_url, b"1"), Slow(redis_url, b"2")]
        values = await asyncio.gather(*(node.get() for node in nodes))
        assert values[0].value == values[1].value == unseal(UNIT.key, stored(redis_url) or b"")
        assert {got.tier for got in values} == {Tier.ENCODED}
        assert all([(await node.get()).value == values[0].value for node in nodes])
        for node in nodes:
            await node.cache.close()

    asyncio.run(main())


SPOILED = {
    "flipped bit": seal(UNIT.key, b"value")[:-1] + bytes([seal(UNIT.key, b"value")[-1] ^ 1]),
    "another unit's": seal(UNITS[1].key, b"value"),
    "cut": seal(UNIT.key, b"value")[:-1],
    "empty": b"",
    "foreign": b"hello",
    "only magic": MAGIC,
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_corrupt_value_is_a_miss_and_is_replaced(redis_url: str, kind: str) -> None:
    async def main() -> None:
        with redis.Redis.from_url(redis_url) as client:
            client.set(PREFIX + UNIT.key, SPOILED[kind])
        node = Node(redis_url)
        got = await node.get()
        assert got == Fetched(UNIT.key.encode(), Tier.ENCODED)
        assert node.errors("corrupt") >= 1
        assert (await Node(redis_url).get()).tier is Tier.REDIS
        await node.cache.close()

    asyncio.run(main())


def test_something_that_is_no_string_is_a_miss_and_is_replaced(redis_url: str) -> None:
    async def main() -> None:
        with redis.Redis.from_url(redis_url) as client:
            client.rpush(PREFIX + UNIT.key, "a", "list")
        node = Node(redis_url)
        assert (await node.get()).tier is Tier.ENCODED
        assert (await Node(redis_url).get()).tier is Tier.REDIS
        await node.cache.close()

    asyncio.run(main())


@given(st.binary(max_size=64), st.data())
def test_no_damage_passes_the_seal(value: bytes, data: st.DataObject) -> None:
    sealed = bytearray(seal(UNIT.key, value))
    assert unseal(UNIT.key, bytes(sealed)) == value
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    assert unseal(UNIT.key, bytes(sealed)) is None


def test_a_value_over_the_limit_stays_out(redis_url: str) -> None:
    async def main() -> None:
        big, small = Node(redis_url, bytes(2000), max_value_bytes=1024), Node(redis_url, max_value_bytes=1024)
        assert (await big.get()).tier is Tier.ENCODED
        assert stored(redis_url) is None
        assert (await small.get()).tier is Tier.ENCODED
        assert stored(redis_url) is not None
        await asyncio.gather(big.cache.close(), small.cache.close())

    asyncio.run(main())


def test_a_redis_that_is_down_costs_no_request(tmp_path: Path) -> None:
    async def main() -> None:
        with EmbeddedRedis(tmp_path, "cache") as server:
            node = Node(server.url, memory_bytes=0)
            assert (await node.get()).tier is Tier.ENCODED
            assert (await node.get()).tier is Tier.REDIS
            server.kill()
            for unit in UNITS:
                assert (await node.get(unit)).tier is Tier.ENCODED
            assert node.errors("down") == 1  # then it is left alone
            await node.cache.close()

    asyncio.run(main())


@pytest.fixture
def silent_url() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


def test_a_redis_that_hangs_costs_its_timeout_once(silent_url: str) -> None:
    async def main() -> None:
        node = Node(silent_url, memory_bytes=0, timeout_s=0.2)
        started = time.monotonic()
        for unit in UNITS:
            assert (await node.get(unit)).tier is Tier.ENCODED
        assert 0.15 < time.monotonic() - started < 1.0
        assert node.errors("timeout") == 1
        await node.cache.close()

    asyncio.run(main())


def test_a_redis_that_comes_back_is_used_again(tmp_path: Path) -> None:
    async def main() -> None:
        with EmbeddedRedis(tmp_path, "cache") as server:
            node = Node(server.url, memory_bytes=0, pause_s=0.0)
            await node.get()
            server.kill()
            assert (await node.get()).tier is Tier.ENCODED
            server.start()
            assert (await node.get()).tier is Tier.ENCODED
            assert (await node.get()).tier is Tier.REDIS
            await node.cache.close()

    asyncio.run(main())


def test_a_full_redis_still_serves_what_it_has(redis_url: str) -> None:
    """Writes are refused, reads go on at once: a refusal is not an outage."""

    async def main() -> None:
        node = Node(redis_url, memory_bytes=0)
        await node.get(UNITS[1])
        with redis.Redis.from_url(redis_url) as client:
            policy = client.config_get("maxmemory-policy")
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 1)
            try:
                assert (await node.get(UNITS[2])).tier is Tier.ENCODED
                assert (node.errors("full"), node.errors("down")) == (1, 0)
                assert node.cache.stats().redis == "up"
                assert (await node.get(UNITS[1])).tier is Tier.REDIS
            finally:
                client.config_set("maxmemory", 0)
                client.config_set("maxmemory-policy", policy["maxmemory-policy"])
        await node.cache.close()

    asyncio.run(main())


def test_a_refusal_is_no_outage(redis_url: str) -> None:
    async def main() -> None:
        node = Node(redis_url, memory_bytes=0)
        await node.get(UNITS[1])
        with redis.Redis.from_url(redis_url) as client:
            client.config_set("min-replicas-to-write", 1)
            try:
                assert (await node.get(UNITS[2])).tier is Tier.ENCODED
                assert (node.errors("refused"), node.errors("full"), node.errors("down")) == (1, 0, 0)
                assert node.cache.stats().redis == "up"
                assert (await node.get(UNITS[1])).tier is Tier.REDIS
            finally:
                client.config_set("min-replicas-to-write", 0)
        await node.cache.close()

    asyncio.run(main())


def test_what_redis_has_waits_for_no_forward(redis_url: str) -> None:
    async def main() -> None:
        writer, reader = Node(redis_url), Node(redis_url, memory_bytes=0)
        await writer.get(UNITS[0])
        reader.gate.clear()
        both = asyncio.create_task(reader.cache.get_many(UNITS[:2]))
        joined = asyncio.create_task(reader.get(UNITS[0]))
        await reader.calls.acquire()
        async with asyncio.timeout(10):
            assert (await joined).tier is Tier.REDIS
            assert (await reader.get(UNITS[0])).tier is Tier.REDIS
        assert not both.done()
        reader.gate.set()
        assert [got.tier for got in (await both).values()] == [Tier.REDIS, Tier.ENCODED]
        await asyncio.gather(writer.cache.close(), reader.cache.close())

    asyncio.run(main())


def test_what_redis_has_is_in_memory_before_the_rest_is_encoded(redis_url: str) -> None:
    async def main() -> None:
        writer, reader = Node(redis_url), Node(redis_url)
        await writer.get(UNITS[0])
        reader.gate.clear()
        both = asyncio.create_task(reader.cache.get_many(UNITS[:2]))
        await reader.calls.acquire()
        async with asyncio.timeout(10):
            assert (await reader.get(UNITS[0])).tier is Tier.MEMORY
        reader.gate.set()
        await both
        await asyncio.gather(writer.cache.close(), reader.cache.close())

    asyncio.run(main())


@pytest.mark.parametrize("by_row", [False, True])
def test_a_call_is_one_round_trip(redis_url: str, by_row: bool) -> None:
    """A job's positive and negative units, of all its encoders, hits and misses, are one MGET; what is in memory asks
    nothing."""

    async def main() -> None:
        writer, reader = Node(redis_url), Node(redis_url, write_through=False, by_row=by_row)
        await writer.cache.get_many(UNITS[:3])
        with redis.Redis.from_url(redis_url) as client:
            client.config_resetstat()
        wanted = [*UNITS, EncodeUnit("another", (1,))]
        tiers = [got.tier for got in (await reader.cache.get_many(wanted)).values()]
        assert tiers == [Tier.REDIS] * 3 + [Tier.ENCODED] * 3
        await reader.cache.get_many(wanted)
        assert commands(redis_url) == {"mget": 1}
        hits = reader.cache.stats().hits
        assert (hits.memory, hits.redis, hits.encoded) == (6, 3, 3)
        await asyncio.gather(writer.cache.close(), reader.cache.close())

    asyncio.run(main())


def test_a_hit_in_redis_takes_milliseconds(redis_url: str) -> None:
    """SDXL's units in float16. The bar is 2 ms; the test leaves room for a busy machine."""

    async def main() -> None:
        pair = UNITS[:3]
        sizes = (77 * 768 * 2, 77 * 1280 * 2, 1280 * 2)
        with redis.Redis.from_url(redis_url) as client:
            client.mset(
                {PREFIX + unit.key: seal(unit.key, bytes(size)) for unit, size in zip(pair, sizes, strict=True)}
            )
        node = Node(redis_url, memory_bytes=0)
        times = []
        for _ in range(50):
            started = time.perf_counter()
            got = await node.cache.get_many(pair)
            times.append(time.perf_counter() - started)
        assert {each.tier for each in got.values()} == {Tier.REDIS}
        assert statistics.median(times) < 10e-3
        await node.cache.close()

    asyncio.run(main())


def test_a_private_encoder_leaves_redis_alone(redis_url: str) -> None:
    async def main() -> None:
        other = EncodeUnit("other", (1,))
        node = Node(redis_url, private=(UNIT.encoder,))
        got = await node.cache.get_many([UNIT, other])
        assert {each.tier for each in got.values()} == {Tier.ENCODED}
        assert stored(redis_url, UNIT) is None
        assert stored(redis_url, other) is not None
        node.cache.adopt({UNITS[1]: b"by-product"})
        assert (await node.get(UNITS[1])).tier is Tier.MEMORY
        assert stored(redis_url, UNITS[1]) is None
        await node.cache.close()

    asyncio.run(main())


def test_a_by_product_is_shared(redis_url: str) -> None:
    async def main() -> None:
        node, reader = Node(redis_url), Node(redis_url)
        node.cache.adopt({UNIT: b"by-product"})
        assert await node.get() == Fetched(b"by-product", Tier.MEMORY)
        assert await reader.get() == Fetched(b"by-product", Tier.REDIS)
        node.cache.check_integrity()
        assert node.cache.stats().entries == 1
        assert node.encoded == reader.encoded == []
        await asyncio.gather(node.cache.close(), reader.cache.close())

    asyncio.run(main())


def test_a_by_product_that_another_process_stored_first_gives_way(redis_url: str) -> None:
    async def main() -> None:
        first, second = Node(redis_url, b"1"), Node(redis_url, b"2")
        value = (await first.get()).value
        second.cache.adopt({UNIT: b"by-product"})
        assert (await second.get()).value == value
        await asyncio.gather(first.cache.close(), second.cache.close())

    asyncio.run(main())


def test_a_by_product_that_comes_while_redis_is_asked_saves_the_forward(redis_url: str) -> None:
    async def main() -> None:
        async with SlowProxy(redis_url) as proxy:
            node = Node(proxy.url, timeout_s=5.0)
            await node.get(UNITS[1])
            proxy.delay_s = 0.1
            answers = proxy.answers
            waiting = asyncio.create_task(node.get())
            await until(lambda: proxy.answers > answers)  # the MGET is on its way back
            node.cache.adopt({UNIT: b"by-product"})
            assert await waiting == Fetched(b"by-product", Tier.MEMORY)
            assert node.encoded == [UNITS[1]]
            assert unseal(UNIT.key, stored(redis_url) or b"") == b"by-product"
            await node.cache.close()

    asyncio.run(main())


def test_what_is_paid_for_is_stored_though_everybody_left(redis_url: str) -> None:
    async def main() -> None:
        async with SlowProxy(redis_url) as proxy:
            node = Node(proxy.url, timeout_s=5.0)
            node.gate.clear()
            waiting = asyncio.create_task(node.get())
            await node.calls.acquire()
            proxy.delay_s = 0.05
            node.gate.set()
            await until(lambda: stored(redis_url) is not None)
            waiting.cancel()
            await until(lambda: node.cache.stats().entries == 1)
            assert (await node.get()).tier is Tier.MEMORY
            await node.cache.close()

    asyncio.run(main())


@pytest.mark.parametrize("leases", [0.0, 60.0])
def test_who_comes_while_a_value_is_stored_gets_it(redis_url: str, leases: float) -> None:
    """The one who had it encoded has left meanwhile: it is not encoded again."""

    async def main() -> None:
        async with SlowProxy(redis_url) as proxy:
            node = Node(proxy.url, timeout_s=5.0, leases=leases)
            node.gate.clear()
            leader = asyncio.create_task(node.get())
            await node.calls.acquire()
            proxy.delay_s = 0.2
            node.gate.set()
            await until(lambda: stored(redis_url) is not None)
            leader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leader
            assert node.cache.stats().in_flight == 1
            assert (await node.get()).tier is Tier.ENCODED
            assert node.encoded == [UNIT]
            node.cache.check_integrity()
            await node.cache.close()

    asyncio.run(main())


def test_exact_and_int8_values_are_kept_apart(redis_url: str) -> None:
    """The value used is the value stored, rounded or not; who asks for exact ones never gets a rounded one."""

    async def main() -> None:
        rows = torch.randn(4, 64)

        def node(values: Literal["exact", "int8"]) -> Node:
            async def encode(units: Sequence[EncodeUnit]) -> list[Fetched]:
                return [Fetched(pack(rows, values), Tier.ENCODED)]

            made = Node(redis_url, values=values)
            made.cache._fetch = encode
            return made

        rounded, exact, rounded_too = node("int8"), node("exact"), node("int8")
        fresh = await rounded.get()
        assert not torch.equal(unpack(fresh.value), rows)
        assert (await rounded.get()) == Fetched(fresh.value, Tier.MEMORY)
        assert (await rounded_too.get()) == Fetched(fresh.value, Tier.REDIS)
        true = await exact.get()
        assert true.tier is Tier.ENCODED
        assert torch.equal(unpack(true.value), rows)
        await asyncio.gather(*(each.cache.close() for each in (rounded, exact, rounded_too)))

    asyncio.run(main())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.lists(st.sampled_from(UNITS), min_size=1, max_size=4),
            st.sampled_from(["nothing", "nothing", "drop", "spoil"]),
        ),
        max_size=12,
    )
)
def test_any_order_of_calls_gives_one_value_per_unit(
    redis_url: str, calls: list[tuple[int, list[EncodeUnit], str]]
) -> None:
    """Three processes, one Redis, entries that vanish or rot: each process always sees a true value of the unit."""

    async def main() -> None:
        with redis.Redis.from_url(redis_url) as client:
            client.flushall()
            nodes = [Node(redis_url, mark, memory_bytes=size) for mark, size in ((b"0", 0), (b"1", 700), (b"2", 9999))]
            true: dict[str, set[bytes]] = {}
            for index, wanted, mishap in calls:
                if mishap == "drop":
                    client.delete(PREFIX + wanted[0].key)
                elif mishap == "spoil":
                    client.set(PREFIX + wanted[0].key, b"rot")
                got = await nodes[index].cache.get_many(wanted)
                assert set(got) == {unit.key for unit in wanted}
                for key, each in got.items():
                    if each.tier is Tier.ENCODED:
                        true.setdefault(key, set()).add(each.value)
                    assert each.value in true[key]
                    held = client.get(PREFIX + key)
                    if each.tier is not Tier.MEMORY:
                        assert unseal(key, held) == each.value
            for node in nodes:
                node.cache.check_integrity()
                await node.cache.close()

    asyncio.run(main())
