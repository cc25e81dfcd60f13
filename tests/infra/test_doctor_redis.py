"""What `tandem doctor` says of Redis servers as people have them."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr
from support.jobs import Bench, a_request, on

from serve.doctor.findings import Finding
from serve.doctor.patience import check_patience
from serve.doctor.redis_look import look
from serve.doctor.redis_servers import cache_findings, check_redis_servers, common_findings, jobs_findings
from serve.embedded import EmbeddedRedis
from serve.jobs.schema import SCHEMA
from serve.settings.stores import CacheSettings, JobSettings
from serve.settings.tree import Settings


@pytest.fixture
def other(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """One for embeddings, whose settings a test may change."""
    with EmbeddedRedis(tmp_path, "cache") as server:
        yield server


def told(jobs: str | None = None, cache: str | None = None, data_dir: Path = Path("unused")) -> dict[str, Finding]:
    """What is not as it should be, by code and setting."""
    settings = Settings(
        data_dir=data_dir,
        jobs=JobSettings(redis_url=SecretStr(jobs) if jobs else None),
        cache=CacheSettings(redis_url=SecretStr(cache) if cache else None),
    )
    found = check_redis_servers(settings)
    assert all(each.cure for each in found if each.level != "ok")
    assert len({(each.code, each.setting, each.told) for each in found}) == len(found)
    return {f"{each.level} {each.code}": each for each in found if each.level != "ok"}


def test_two_servers_as_they_should_be(jobs_redis: EmbeddedRedis, other: EmbeddedRedis, tmp_path: Path) -> None:
    with redis.Redis.from_url(other.url) as client:
        client.config_set("maxmemory", "64mb")
        assert told(jobs_redis.url, other.url) == {}
        assert told(data_dir=tmp_path) == {}, "that of a running `tandem up` is found by its data_dir"
        assert client.dbsize() == 0, "the probes are gone"


def test_each_in_the_place_of_the_other(jobs_redis: EmbeddedRedis, other: EmbeddedRedis) -> None:
    found = told(other.url, jobs_redis.url)
    assert set(found) == {
        "fault jobs-redis-no-file",
        "fault jobs-redis-evicts",
        "warning cache-redis-keeps",
        "warning cache-redis-unbounded",
        "warning cache-redis-file",
    }
    assert "allkeys-lfu" in found["fault jobs-redis-evicts"].told
    assert {each.setting for each in found.values()} == {"jobs.redis_url", "cache.redis_url"}


def test_one_server_for_both(jobs_redis: EmbeddedRedis) -> None:
    assert told(jobs_redis.url, jobs_redis.url)["fault redis-one-server"].setting == "cache.redis_url"


def test_a_file_that_is_not_written_at_once(jobs_redis: EmbeddedRedis) -> None:
    with redis.Redis.from_url(jobs_redis.url) as client:
        client.config_set("appendfsync", "everysec")
        assert set(told(jobs_redis.url)) == {"warning jobs-redis-fsync"}


def test_memory_that_is_nearly_or_quite_taken(jobs_redis: EmbeddedRedis) -> None:
    with redis.Redis.from_url(jobs_redis.url) as client:
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory", int(used * 1.15))
        assert set(told(jobs_redis.url)) == {"warning jobs-redis-full"}
        client.config_set("maxmemory", used // 2)
        found = told(jobs_redis.url)
        assert set(found) == {"fault jobs-redis-full", "fault redis-refuses"}
        assert "maxmemory" in found["fault redis-refuses"].told


def test_a_replica_takes_no_writes(jobs_redis: EmbeddedRedis) -> None:
    with redis.Redis.from_url(jobs_redis.url) as client:
        client.replicaof("127.0.0.1", "1")
        assert set(told(jobs_redis.url)) == {"fault redis-role", "fault redis-refuses"}


def test_a_user_who_may_not_look_or_not_write(jobs_redis: EmbeddedRedis) -> None:
    with redis.Redis.from_url(jobs_redis.url) as client:
        client.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~tandem:*", "&*", "+@all", "-info", "-config")
        client.execute_command("ACL", "SETUSER", "reader", "on", ">pw", "~*", "&*", "+@all", "-eval")
    place = jobs_redis.url.rpartition("@")[2]
    assert set(told(f"redis://app:pw@{place}")) == {"warning redis-silent"}
    assert set(told(f"redis://reader:pw@{place}")) == {"fault redis-refuses"}
    (away,) = told(f"redis://app:other@{place}").values()
    assert (away.code, away.setting) == ("redis-away", "jobs.redis_url")
    assert "other@" not in away.told


def test_nothing_there() -> None:
    found = told("redis://127.0.0.1:1", "redis://127.0.0.1:1")
    assert set(found) == {"fault redis-away"}


def test_what_no_redis_here_can_be_made_to_be(jobs_redis: EmbeddedRedis) -> None:
    """Old, a cluster, crowded, of another time, slow: the same look with other figures."""
    seen = look(jobs_redis.url, "jobs.redis_url")

    def codes(**changes: object) -> set[str]:
        info = {**seen.info, **changes.pop("info", {})}  # type: ignore[dict-item]
        other = dataclasses.replace(seen, info=info, **changes)  # type: ignore[arg-type]
        return {each.code for each in (*common_findings(other), *jobs_findings(other)) if each.level != "ok"}

    assert codes() == set()
    assert codes(info={"redis_version": "6.0.16"}) == {"redis-old"}
    assert codes(info={"redis_version": "10.0.0"}) == set()
    assert codes(info={"cluster_enabled": 1}) == {"redis-cluster"}
    assert codes(info={"connected_clients": 90, "maxclients": 100}) == {"redis-connections"}
    assert codes(info={"aof_last_write_status": "err"}) == {"jobs-redis-file-fails"}
    assert codes(info={"aof_enabled": 0, "connected_slaves": 2}) == {"jobs-redis-no-file"}
    assert codes(ahead_s=-30.0) == {"clock-redis"}
    assert codes(ping_s=0.02) == {"redis-slow"}
    assert codes(write_s=0.1) == {"jobs-redis-slow-disk"}
    slow = dataclasses.replace(seen, setting="cache.redis_url", ping_s=0.3)
    assert {each.code for each in cache_findings(slow, 0.25) if each.level == "fault"} == {"redis-slow"}
    assert "redis-slow" in {each.code for each in cache_findings(slow, 5.0) if each.level == "warning"}


def test_times_that_do_not_fit_each_other() -> None:
    assert [each.level for each in check_patience(Settings())] == ["ok"]
    tree = {"http": {"replicas": 2, "wait_s": 60}, "jobs": {"queue_ttl_s": 60, "max_queued_s": 61}}
    found = {each.code: each.setting for each in check_patience(Settings.model_validate(tree))}
    assert found == {"calls-cut": "http.drain_s", "queue-time": "jobs.queue_ttl_s"}
    tree = {"http": {"replicas": 2, "wait_s": 60, "drain_s": 60}, "jobs": {"queue_ttl_s": 61, "max_queued_s": 61}}
    assert [each.level for each in check_patience(Settings.model_validate(tree))] == ["ok"]


def test_jobs_that_outlast_a_drain_or_wait_for_a_newer_release(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.succeed(await bench.claimed())
        await bench.store.submit("b", a_request())
        given = {"jobs": {"redis_url": redis_url}, "diffusion": {"drain_s": 90}}
        tree = Settings.model_validate(given)
        assert [each.code for each in check_patience(tree)] == ["times"]
        with redis.Redis.from_url(redis_url) as client:
            started = float(client.hget("tandem:job:a", "started") or 0)
            client.hset("tandem:job:a", "finished", str(started + 95_000))
            client.hset("tandem:job:b", "schema", SCHEMA.newest + 1)
        assert {each.code for each in check_patience(tree)} == {"drain-short", "jobs-newer"}
        two = given | {"placements": {"slow": {"drain_s": 300}, "quick": {}}}
        assert "drain-short" in {each.code for each in check_patience(Settings.model_validate(two))}
        one = given | {"placements": {"slow": {"drain_s": 300}}}
        assert {each.code for each in check_patience(Settings.model_validate(one))} == {"jobs-newer"}

    on(redis_url, story)
