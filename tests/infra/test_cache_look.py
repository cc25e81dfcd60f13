"""Looking where embeddings are: nothing is loaded, nothing counts, and a Redis that is away has nothing."""

import asyncio
from collections.abc import Sequence

from pydantic import SecretStr

from serve.domain.text import CacheReport, EncodeUnit, Tier
from serve.encoders.cache import EmbeddingCache, Fetched
from serve.settings.stores import CacheSettings
from serve.telemetry.metrics import InProcessMetrics

UNITS = [EncodeUnit("encoder", (1, 2, number)) for number in range(4)]
PRIVATE = EncodeUnit("private", (1, 2, 3))


async def encode(units: Sequence[EncodeUnit]) -> list[Fetched]:
    return [Fetched(b"value", Tier.ENCODED) for _ in units]


def test_where_each_unit_is(redis_url: str) -> None:
    async def story() -> None:
        settings = CacheSettings(redis_url=SecretStr(redis_url))
        options = {"place": "a test", "write_through": True, "private": ["private"]}
        writer, reader = (EmbeddingCache(settings, encode, InProcessMetrics(), **options) for _ in range(2))
        await writer.get_many([UNITS[0], UNITS[1], PRIVATE])
        await reader.get_many([UNITS[1]])
        before = reader.stats().hits
        assert await reader.look([*UNITS, PRIVATE]) == {
            UNITS[0].key: Tier.REDIS,
            UNITS[1].key: Tier.MEMORY,
            UNITS[2].key: Tier.ENCODED,
            UNITS[3].key: Tier.ENCODED,
            PRIVATE.key: Tier.ENCODED,
        }
        assert reader.stats().hits == before == CacheReport(redis=1)
        assert reader.stats().entries == 1, "nothing was loaded"
        assert await reader.look([]) == {}
        await writer.close()
        await reader.close()

    asyncio.run(story())


def test_a_look_does_not_keep_an_entry_alive() -> None:
    async def story() -> None:
        settings = CacheSettings(memory_bytes=2 * (256 + 5))
        cache = EmbeddingCache(settings, encode, InProcessMetrics(), place="a test")
        await cache.get_many([UNITS[0]])
        await cache.get_many([UNITS[1]])
        assert (await cache.look([UNITS[0]]))[UNITS[0].key] is Tier.MEMORY
        await cache.get_many([UNITS[2]])
        assert (await cache.look([UNITS[0]]))[UNITS[0].key] is Tier.ENCODED, "it was used longest ago all the same"
        await cache.close()

    asyncio.run(story())


def test_a_redis_that_is_away_has_nothing() -> None:
    async def story() -> None:
        settings = CacheSettings(redis_url=SecretStr("redis://127.0.0.1:1/0"))
        cache = EmbeddingCache(settings, encode, InProcessMetrics(), place="a test")
        assert await cache.look(UNITS[:1]) == {UNITS[0].key: Tier.ENCODED}
        await cache.close()

    asyncio.run(story())
