"""API keys on a real Redis: what opens, what does not, and how soon a revoked key stops."""

import asyncio
import hashlib
import string
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from support.slow_proxy import SlowProxy

from serve.callers import Allowance, Scope
from serve.embedded import EmbeddedRedis
from serve.errors import BackendUnavailable, OperatorError, Unauthorized
from serve.keys import _REMEMBERED, KEEP_S, KeyStore
from serve.settings.stores import JobSettings
from serve.telemetry.metrics import InProcessMetrics

FIRST = f"tdm_{'b' * 12}_{'B' * 43}"
UNKNOWN = f"tdm_{'a' * 12}_{'A' * 43}"
NOBODY = "redis://127.0.0.1:1/0"
"""Where nothing listens: whoever asks there finds the store away."""


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[KeyStore]:
    store = KeyStore(JobSettings(redis_url=SecretStr(url)), InProcessMetrics())
    try:
        yield store
    finally:
        await store.close()


def on(url: str, story: Callable[[KeyStore], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with opened(url) as store:
            await story(store)

    asyncio.run(run())


async def refusal(store: KeyStore, token: str) -> str:
    with pytest.raises(Unauthorized) as refused:
        await store.find(token)
    return refused.value.message


async def valid(store: KeyStore, token: str) -> bool:
    try:
        await store.find(token)
    except Unauthorized:
        return False
    return True


def test_a_key_opens_as_what_it_was_made(redis_url: str) -> None:
    allowance = Allowance(requests_per_minute=60, engine_s_per_day=1800.5, max_unfinished=4)

    async def story(store: KeyStore) -> None:
        assert not await store.ever_made()
        assert await store.list() == ()
        first = await store.create("a café ☃")
        second = await store.create("ops", {Scope.ADMIN}, 2.5, allowance, 3600)
        assert await store.ever_made()
        assert await store.find(first.secret) == first.key
        assert await store.find(second.secret) == second.key
        assert first.key.scopes == {Scope.GENERATE, Scope.EMBED}
        assert (second.key.weight, second.key.allowance) == (2.5, allowance)
        assert first.key.expires_at is None
        assert second.key.expires_at == second.key.created_at + 3600
        async with opened(redis_url) as other:
            assert await other.list() == (first.key, second.key)
            assert await other.find(first.secret) == first.key

    on(redis_url, story)


def test_the_first_key_is_made_once_however_many_make_it(redis_url: str) -> None:
    async def story(store: KeyStore) -> None:
        async with opened(redis_url) as second, opened(redis_url) as third:
            stores = (store, second, third)
            assert await asyncio.gather(*(each.make_first(FIRST) for each in stores * 10)) == [None] * 30
        (key,) = await store.list()
        assert (key.id, key.name, key.scopes) == ("b" * 12, "first", frozenset(Scope))
        assert await store.find(FIRST) == key
        assert await store.make_first(FIRST) is None
        assert await store.list() == (key,), "made when it was made first"

    on(redis_url, story)


def test_a_first_key_that_was_revoked_stays_so_and_another_of_its_id_opens_nothing(redis_url: str) -> None:
    async def story(store: KeyStore) -> None:
        await store.make_first(FIRST)
        other = f"{FIRST[:-1]}A"
        assert await store.make_first(other) == f"key {'b' * 12} was made before, with another secret"
        assert not await valid(store, other)
        assert await valid(store, FIRST)
        revoked = await store.revoke("b" * 12)
        assert await store.make_first(FIRST) == f"key {'b' * 12} was revoked"
        assert await store.list() == (revoked,)
        assert await refusal(store, FIRST) == "the API key was revoked"

    on(redis_url, story)


def test_the_secret_is_written_nowhere(redis_url: str) -> None:
    async def story(store: KeyStore) -> None:
        new = await store.create("a name")
        kind, key_id, secret = new.secret.split("_", 2)
        assert (kind, key_id, len(secret)) == ("tdm", new.key.id, 43)
        assert secret not in repr(new)
        with redis.Redis.from_url(redis_url) as client:
            assert sorted(client.keys()) == [f"tandem:key:{key_id}".encode(), b"tandem:keys"]
            record = client.hgetall(f"tandem:key:{key_id}")
        assert record[b"sha256"].decode() == hashlib.sha256(new.secret.encode()).hexdigest()
        assert secret.encode() not in b"".join(record.values())

    on(redis_url, story)


def test_revoked_and_expired_keys_are_refused_and_their_holders_told_why(redis_url: str) -> None:
    async def story(store: KeyStore) -> None:
        new, brief = await store.create("a"), await store.create("b", expires_in_s=0.05)
        wrong = new.secret[:-1] + ("A" if new.secret[-1] != "A" else "B")
        assert await refusal(store, wrong) == "the API key is not valid"
        revoked = await store.revoke(new.key.id)
        assert revoked.revoked_at is not None
        assert revoked.revoked_at >= new.key.created_at
        assert await store.revoke(new.key.id) == revoked, "once more changes nothing"
        assert await refusal(store, new.secret) == "the API key was revoked"
        assert await refusal(store, wrong) == await refusal(store, UNKNOWN) == "the API key is not valid"
        assert (await store.list())[0] == revoked
        deadline = time.monotonic() + 5
        while await valid(store, brief.secret):
            assert time.monotonic() < deadline
        assert await refusal(store, brief.secret) == "the API key has expired"

    on(redis_url, story)


def test_a_key_that_is_remembered_expires_all_the_same(redis_url: str) -> None:
    async def story(store: KeyStore) -> None:
        new = await store.create("a", expires_in_s=KEEP_S / 2)
        began = time.monotonic()
        await store.find(new.secret)
        asked = time.monotonic()
        while await valid(store, new.secret):
            assert asked - began < KEEP_S * 0.6
            asked = time.monotonic()

    on(redis_url, story)


@pytest.mark.parametrize("key_id", ["a" * 12, "", "*", "a" * 13, "A" * 12, f"{'a' * 12}\n", UNKNOWN])
def test_only_what_is_a_key_is_revoked(redis_url: str, key_id: str) -> None:
    async def story(store: KeyStore) -> None:
        with pytest.raises(OperatorError, match="no API key has this id"):
            await store.revoke(key_id)
        with redis.Redis.from_url(redis_url) as client:
            assert client.dbsize() == 0

    on(redis_url, story)


def test_another_process_refuses_a_revoked_key_within_a_second(redis_url: str) -> None:
    async def story(store: KeyStore) -> None:
        new = await store.create("a")
        async with opened(redis_url) as other:
            assert await other.find(new.secret) == new.key
            await store.revoke(new.key.id)
            revoked_at = time.monotonic()
            asked = time.monotonic()
            while await valid(other, new.secret):
                assert asked - revoked_at < 1.0
                asked = time.monotonic()

    on(redis_url, story)


def test_a_known_key_costs_one_round_trip_a_second(redis_url: str) -> None:
    async def story(store: KeyStore) -> None:
        new = await store.create("a")
        async with SlowProxy(redis_url) as proxy, opened(proxy.url) as behind:
            for _ in range(3):  # one connection is enough from here on
                began = time.monotonic()
                await behind.find(new.secret)
                answers = proxy.answers
                for _ in range(200):
                    await behind.find(new.secret)
                    await refusal(behind, f"tdm_{new.key.id}_{'A' * 43}")
                if time.monotonic() - began < KEEP_S:
                    assert proxy.answers == answers
                    return
        raise AssertionError("the machine never made 400 look-ups in a second")

    on(redis_url, story)


def test_what_is_no_key_costs_no_round_trip() -> None:
    async def story(store: KeyStore) -> None:
        for token in ("", "hunter2", UNKNOWN[:-1], f"{UNKNOWN}A", UNKNOWN.upper(), f" {UNKNOWN}", f"{UNKNOWN}\n"):
            assert await refusal(store, token) == "the API key is not valid"
        with pytest.raises(BackendUnavailable) as away:
            await store.find(UNKNOWN)
        assert away.value.retry_after_s

    on(NOBODY, story)


def test_made_up_keys_fill_nothing(redis_url: str) -> None:
    async def story(store: KeyStore) -> None:
        letters = string.ascii_lowercase[:25]
        for number in range(500):
            made_up = f"{letters[number % 25]}{letters[number // 25]}".ljust(12, "a")
            await refusal(store, f"tdm_{made_up}_{'A' * 43}")
        assert not store._seen
        for number in range(_REMEMBERED + 2):
            new = await store.create(str(number))
            await store.find(new.secret)
        assert len(store._seen) == _REMEMBERED
        with redis.Redis.from_url(redis_url) as client:
            assert client.dbsize() == _REMEMBERED + 2 + 1

    on(redis_url, story)


@pytest.mark.parametrize(
    "fields",
    [
        {"key": "not JSON"},
        {"key": '{"id": "a"}'},
        {"sha256": b"\xff"},
        {"revoked_at": "yesterday"},
        {"key": None},
        {"sha256": None},
    ],
)
def test_a_record_that_cannot_be_read_opens_nothing(redis_url: str, fields: dict[str, Any]) -> None:
    async def story(store: KeyStore) -> None:
        new, sound = await store.create("a"), await store.create("b")
        with redis.Redis.from_url(redis_url) as client:
            for name, value in fields.items():
                if value is None:
                    client.hdel(f"tandem:key:{new.key.id}", name)
                else:
                    client.hset(f"tandem:key:{new.key.id}", name, value)
        assert await refusal(store, new.secret) == "the API key is not valid"
        assert await store.list() == (sound.key,)

    on(redis_url, story)


def test_keys_survive_the_death_of_their_redis(jobs_redis: EmbeddedRedis) -> None:
    async def story(store: KeyStore) -> None:
        new = await store.create("a")
        jobs_redis.kill()
        with pytest.raises(BackendUnavailable):
            await store.find(new.secret)
        jobs_redis.start()
        assert await store.find(new.secret) == new.key

    on(jobs_redis.url, story)


def _mangled(token: str) -> st.SearchStrategy[str]:
    """The token with one thing wrong, or something else."""
    places, characters = st.integers(0, len(token) - 1), st.characters()
    looks = string.ascii_letters + string.digits + "_-="

    def changed(place: int, other: str) -> str:
        return token[:place] + other + token[place + 1 :]

    return st.one_of(
        st.builds(changed, places, characters),
        st.builds(changed, places, st.sampled_from(looks)),
        st.builds(changed, places, st.just("")),
        st.builds(lambda place, other: token[:place] + other + token[place:], places, st.text(max_size=3)),
        st.builds(lambda place: changed(place, token[place].swapcase()), places),
        st.builds(lambda first, last: token[first:] + token[:last], places, places),
        st.builds(lambda before, after: f"{before}{token}{after}", st.text(max_size=3), st.text(max_size=3)),
        st.from_regex(r"\Atdm_[a-z2-7]{12}_[A-Za-z0-9_-]{43}\Z"),
        st.builds(lambda secret: token[:17] + secret, st.text(looks, min_size=43, max_size=43)),
        st.text(),
    )


def test_no_mangled_key_is_accepted(redis_url: str) -> None:
    with asyncio.Runner() as runner:
        store = KeyStore(JobSettings(redis_url=SecretStr(redis_url)), InProcessMetrics())
        new, other = (runner.run(store.create(name)) for name in ("a", "b"))
        swapped = f"tdm_{other.key.id}_{new.secret[17:]}"
        assert runner.run(refusal(store, swapped)) == "the API key is not valid"

        @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
        @given(_mangled(new.secret))
        def never(token: str) -> None:
            if token == new.secret:
                assert runner.run(store.find(token)) == new.key
            else:
                runner.run(refusal(store, token))

        never()
        runner.run(store.close())
