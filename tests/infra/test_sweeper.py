"""Records and pictures go together, whatever the result store does meanwhile; leases go back beside that."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.jobs import BROKEN, Bench, a_request, on, until
from support.small_s3 import BUCKET, a_bucket, s3_settings

from serve.domain.jobs import JobState
from serve.embedded import EmbeddedRedis
from serve.errors import BackendUnavailable, JobNotFound
from serve.jobs import sweeper
from serve.jobs.store import JobStore
from serve.jobs.sweeper import DELETIONS, PAGE, Objects, sweep
from serve.results.store import ResultStore, open_store
from serve.settings.stores import ResultSettings

OVER = {"result_ttl_s": 0.001}
"""Time that is over as soon as a job has ended."""


@contextlib.asynccontextmanager
async def sweeping(store: JobStore, results: Objects, lease_s: float = 0.001) -> AsyncIterator[None]:
    task = asyncio.create_task(sweep(store, results, lease_s, interval_s=0.01))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def cancelled(bench: Bench, results: ResultStore, job_id: str, files: int = 1) -> None:
    """A job that has ended and left so many files."""
    await bench.store.submit(job_id, a_request())
    await bench.store.cancel(job_id)
    for index in range(files):
        await results.put(f"{job_id}/{index}.png", b"a picture", "image/png")


async def is_gone(bench: Bench, job_id: str) -> bool:
    try:
        await bench.store.get(job_id)
    except JobNotFound:
        return True
    return False


def test_a_record_and_all_its_pictures_go_and_the_others_stay(redis_url: str, tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        results = open_store(ResultSettings(), tmp_path)
        kept = Bench(redis_url)  # an hour
        claim = await bench.claimed("done")
        for name in ("0.png", "1.webp", "image-0123abcd.png", "mask-0123abcd.png", "manifest.json"):
            await results.put(f"done/{name}", b"bytes", "")
        (tmp_path / "images" / "done" / ".2.png.0123.tmp").touch()  # a worker was killed while it wrote
        await bench.succeed(claim)
        await cancelled(kept, results, "kept")
        await bench.store.submit("waiting", a_request())
        await results.put("waiting/image-0123abcd.png", b"bytes", "image/png")
        await results.put("unknown/0.png", b"bytes", "image/png")
        async with sweeping(bench.store, results):
            await until(lambda: is_gone(bench, "done"))
        left = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "images").rglob("*.*"))
        assert left == ["images/kept/0.png", "images/unknown/0.png", "images/waiting/image-0123abcd.png"]
        assert not (tmp_path / "images" / "done").exists()
        assert (await kept.store.get("kept")).state is JobState.CANCELLED
        await kept.store.close()

    on(redis_url, story, **OVER)


def test_a_dead_letter_and_what_it_starts_from_outlive_the_others(redis_url: str, tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        results = open_store(ResultSettings(), tmp_path)
        for job_id, retry in (("dead", True), ("refused", False)):
            claim = await bench.claimed(job_id)
            await results.put(f"{job_id}/image-0123abcd.png", b"bytes", "image/png")
            await bench.store.fail(claim, BROKEN, retry=retry)
        async with sweeping(bench.store, results):
            await until(lambda: is_gone(bench, "refused"))
        assert (await bench.store.get("dead")).state is JobState.FAILED
        assert [path.name for path in (tmp_path / "images").iterdir()] == ["dead"]

    on(redis_url, story, max_attempts=1, **OVER)


def test_what_can_t_be_deleted_is_tried_again_and_keeps_nobody_back(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(bench: Bench) -> None:
        results = open_store(ResultSettings(), tmp_path)
        folder = tmp_path / "images"
        folder.mkdir()
        stuck = [f"stuck{number}" for number in range(PAGE + 20)]
        for job_id in stuck:
            await cancelled(bench, results, job_id, files=0)
            (folder / job_id).touch()  # not a folder: it can't be emptied
        await cancelled(bench, results, "after_them")
        async with sweeping(bench.store, results):
            await until(lambda: is_gone(bench, "after_them"))
            assert not [job_id for job_id in stuck if await is_gone(bench, job_id)], "a record goes after its pictures"
            for job_id in stuck:
                (folder / job_id).unlink()
            for job_id in stuck:
                await until(functools.partial(is_gone, bench, job_id))

    monkeypatch.setattr(sweeper, "TRY_AGAIN_S", 0.5)
    on(redis_url, story, max_queued=1000, **OVER)


def test_many_processes_may_delete_at_once(redis_url: str, tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        results = open_store(ResultSettings(), tmp_path)
        ids = [f"job{number}" for number in range(PAGE + 50)]
        for job_id in ids:
            await cancelled(bench, results, job_id, files=2)
        others = [Bench(redis_url, **OVER) for _ in range(3)]
        async with contextlib.AsyncExitStack() as stack:
            for other in others:
                await stack.enter_async_context(sweeping(other.store, open_store(ResultSettings(), tmp_path)))
            for job_id in ids:
                await until(functools.partial(is_gone, bench, job_id))
        assert not list((tmp_path / "images").iterdir())
        for other in others:
            await other.store.close()

    on(redis_url, story, max_queued=1000, **OVER)


def test_objects_in_a_bucket_go_too(redis_url: str, s3_endpoint: str, tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        results = open_store(s3_settings(s3_endpoint), tmp_path)
        for job_id in ("a", "b", "c"):
            await cancelled(bench, results, job_id, files=3)
        await bench.store.submit("ab", a_request())
        await results.put("ab/0.png", b"a picture", "image/png")
        async with sweeping(bench.store, results):
            for job_id in ("a", "b", "c"):
                await until(functools.partial(is_gone, bench, job_id))
        listed = client.list_objects_v2(Bucket=BUCKET)["Contents"]
        assert [entry["Key"] for entry in listed if "/" in entry["Key"][7:]] == ["images/ab/0.png"]

    with a_bucket(s3_endpoint) as client:
        on(redis_url, story, **OVER)


class Hanging:
    """A result store that lets everybody wait, and counts them."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    async def delete_job(self, job_id: str) -> None:
        self.asked.add(job_id)
        await asyncio.Event().wait()


def test_a_result_store_that_hangs_holds_up_no_lease_and_few_deletions(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        for number in range(3 * DELETIONS):
            await bench.store.submit(f"job{number}", a_request())
            await bench.store.cancel(f"job{number}")
        results = Hanging()
        async with sweeping(bench.store, results):

            async def all_hang() -> bool:
                await asyncio.sleep(0)
                return len(results.asked) == DELETIONS

            await until(all_hang)
            claim = await bench.claimed("a")

            async def is_back() -> bool:
                return (await bench.store.get("a")).state is JobState.QUEUED

            await until(is_back)
        assert len(results.asked) == DELETIONS
        assert claim.attempt == 1

    on(redis_url, story, lease_s=0.01, **OVER)


class Flawed:
    """A result store with a mistake in it that one job meets."""

    def __init__(self) -> None:
        self.deleted: set[str] = set()

    async def delete_job(self, job_id: str) -> None:
        if job_id == "unlucky":
            raise ZeroDivisionError
        self.deleted.add(job_id)


def test_a_mistake_that_one_job_meets_does_not_end_the_sweep(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async def story(bench: Bench) -> None:
        for job_id in ("unlucky", "first"):
            await bench.store.submit(job_id, a_request())
            await bench.store.cancel(job_id)
        results = Flawed()
        async with sweeping(bench.store, results):
            await until(lambda: is_gone(bench, "first"))
            await bench.store.submit("second", a_request())
            await bench.store.cancel("second")
            await until(lambda: is_gone(bench, "second"))
        assert results.deleted == {"first", "second"}
        assert (await bench.store.get("unlucky")).state is JobState.CANCELLED

    on(redis_url, story, **OVER)
    assert "unlucky" in caplog.text


def test_the_job_redis_goes_away_between_the_pictures_and_the_record(jobs_redis: EmbeddedRedis, tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        results = open_store(ResultSettings(), tmp_path)
        deleted = asyncio.Event()

        class Unlucky:
            async def delete_job(self, job_id: str) -> None:
                await results.delete_job(job_id)
                if not deleted.is_set():
                    await asyncio.to_thread(jobs_redis.kill)
                    deleted.set()

        await cancelled(bench, results, "a")
        async with sweeping(bench.store, Unlucky()):
            await deleted.wait()

            async def is_away() -> bool:
                with contextlib.suppress(BackendUnavailable):
                    await bench.store.ping()
                    return False
                return True

            await until(is_away)
            await asyncio.to_thread(jobs_redis.start)
            await until(lambda: is_gone(bench, "a"))
        assert not list((tmp_path / "images").iterdir())

    on(jobs_redis.url, story, **OVER)
