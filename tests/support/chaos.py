"""A house to be struck: Redis and S3 behind proxies, workers in processes of their own, clients, a sweeper."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import random
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from moto.server import ThreadedMotoServer
from pydantic import SecretStr
from support import chaos_worker
from support.chaos_collect import PREFIX, collected, puts_of_bucket, puts_of_folder
from support.history import Accepted, Entry, Heard, Late, Refused, read
from support.tcp_proxy import TcpProxy

from serve.domain.jobs import Job
from serve.domain.orders import ImageRequest
from serve.embedded import EmbeddedRedis
from serve.errors import QueueFull, RateLimited, Unavailable
from serve.jobs.events import follow
from serve.jobs.store import JobStore
from serve.jobs.sweeper import sweep
from serve.jobs.terms import Terms
from serve.results.store import open_store
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics

LEASE_S = 2.0
AWS = {"aws_access_key_id": "test", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
_LOOK_S = 0.05


@dataclass(slots=True)
class Fleet:
    """Workers in processes of their own; one that dies is replaced, as Ray would. `plans` are
    further fields of a worker's plan, by its number, from 1 on.

    Owns: the processes and the task that watches them.
    """

    folder: Path
    settings: Mapping[str, Any]
    clock_s: Mapping[int, float] = field(default_factory=dict)
    plans: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    deaths: int = 0
    started: int = 0
    processes: list[BaseProcess] = field(default_factory=list)
    _watching: asyncio.Task[None] | None = None

    async def start(self, workers: int) -> None:
        for _ in range(workers):
            self.processes.append(self._spawn())
        await self.ready()
        self._watching = asyncio.create_task(self._watch())

    async def join(self) -> None:
        """One more, beside those that were started."""
        self.processes.append(self._spawn())
        await self.ready()

    async def ready(self) -> None:
        def ready() -> bool:
            for process in self.processes:
                assert process.is_alive(), f"{process.name} does not start"
            return all((self.folder / f"ready-{process.name}").exists() for process in self.processes)

        await until(ready, 120)

    async def stop(self) -> None:
        """SIGTERM and the drain; what is left after it is killed."""
        if self._watching:
            self._watching.cancel()
        for process in self.processes:
            self.tell(process, signal.SIGCONT)
            process.terminate()
        for process in self.processes:
            await asyncio.to_thread(process.join, 30)
            process.kill()
            await asyncio.to_thread(process.join)

    def tell(self, process: BaseProcess, number: signal.Signals) -> None:
        """A signal, for example SIGKILL; nothing happens to one that is dead."""
        if process.is_alive() and process.pid:
            os.kill(process.pid, number)

    def _spawn(self) -> BaseProcess:
        self.started += 1
        plan = chaos_worker.WorkerPlan(
            name=f"worker{self.started}",
            settings=dict(self.settings),
            folder=str(self.folder),
            clock_s=self.clock_s.get(self.started, 0.0),
            **self.plans.get(self.started, {}),
        )
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["support.chaos_worker"])
        process = context.Process(target=chaos_worker.main, args=(plan,), name=plan.name, daemon=True)
        with _importable():
            process.start()
        return process

    async def _watch(self) -> None:
        while True:
            for number, process in enumerate(self.processes):
                if not process.is_alive():
                    self.deaths += 1
                    self.processes[number] = self._spawn()
            await asyncio.sleep(_LOOK_S)


@contextlib.contextmanager
def _importable() -> Any:
    """The fork server, which the first process starts, finds `support` as pytest does."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), before)))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


class S3:
    """moto's server with a bucket that keeps every version: one of its own, since all servers of a process share what
    they hold.

    Owns: the server's threads.
    """

    def __init__(self) -> None:
        self.bucket = f"pictures-{uuid.uuid4().hex}"
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        host, self.port = self._moto.get_host_and_port()
        self.client: Any = boto3.client("s3", endpoint_url=f"http://{host}:{self.port}", **AWS)
        self.client.create_bucket(Bucket=self.bucket)
        self.client.put_bucket_versioning(Bucket=self.bucket, VersioningConfiguration={"Status": "Enabled"})

    def settings(self, port: int) -> dict[str, Any]:
        """`results` of the settings, through a proxy's port."""
        s3 = {
            "bucket": self.bucket,
            "prefix": PREFIX,
            "endpoint_url": f"http://127.0.0.1:{port}",
            "region": "us-east-1",
        }
        keys = {"access_key_id": AWS["aws_access_key_id"], "secret_access_key": AWS["aws_secret_access_key"]}
        return {"store": "s3", "s3": s3 | keys}

    def stop(self) -> None:
        self._moto.stop()


class House:
    """Everything but Ray. `redis`, `cache` and `s3` are reached through `to_redis`, `to_cache` and `to_s3`.

    Clients order under ids of their own and ask again until they hear a yes or a no, as the API's PUT lets them.

    Owns: the servers, the proxies, the fleet, and the sweeper.
    """

    def __init__(self, folder: Path, *, seed: int, workers: int = 2, s3: bool = True, **settings: Any) -> None:
        self.folder, self.seed, self.random, self.workers = folder, seed, random.Random(seed), workers
        self._stack = contextlib.ExitStack()
        self.redis = self._stack.enter_context(EmbeddedRedis(folder, "jobs"))
        self.cache = self._stack.enter_context(EmbeddedRedis(folder, "cache", 64 << 20))
        self.s3 = S3() if s3 else None
        if self.s3:
            self._stack.callback(self.s3.stop)
        self.to_redis = self._stack.enter_context(TcpProxy(port_of(self.redis.url), seed))
        self.to_cache = self._stack.enter_context(TcpProxy(port_of(self.cache.url), seed + 1))
        self.to_s3 = self._stack.enter_context(TcpProxy(self.s3.port if self.s3 else 9, seed + 2))
        self.tree: dict[str, Any] = {
            "data_dir": str(folder),
            "jobs": {"lease_s": LEASE_S, "retry_backoff_s": 0.2, "max_queued": 1000, "max_queued_s": 1e6},
            "cache": {},
            "diffusion": {"device": "cpu", "torch_threads": 1, "max_batch_size": 4},
        }
        if self.s3:
            self.tree["results"] = self.s3.settings(self.to_s3.port)
        for room, values in settings.items():
            self.tree[room] = self.tree.get(room, {}) | values
        self.tree["jobs"]["redis_url"] = moved(self.redis.url, self.to_redis.port)
        self.tree["cache"]["redis_url"] = moved(self.cache.url, self.to_cache.port)
        self.settings = Settings.model_validate(self.tree)
        self.fleet = Fleet(folder, self.tree)
        self.told: list[Entry] = []
        self.outages: list[float] = []
        self._tasks: list[asyncio.Task[Any]] = []

    async def __aenter__(self) -> House:
        direct = self.settings.jobs.model_copy(update={"redis_url": SecretStr(self.redis.url)})
        self.jobs = JobStore(self.settings.jobs, InProcessMetrics())
        self.inside = JobStore(direct, InProcessMetrics())
        results = open_store(self.settings.results, self.folder)
        self._tasks.append(asyncio.create_task(sweep(self.jobs, results, LEASE_S, interval_s=0.1)))
        await self.fleet.start(self.workers)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.fleet.stop()
        await self.jobs.close()
        await self.inside.close()
        await asyncio.to_thread(self._stack.close)

    # What clients do.

    async def order(self, job: str, *, owner: str = "", cost_ms: int = 100, **parameters: Any) -> bool:
        """Submit until it is accepted or refused."""
        request = a_small_request(self.settings.model.name or "shapes", **({"prompt": job} | parameters))
        terms = Terms(owner=owner, cost_ms=cost_ms, fingerprint=f"{job} {owner}")
        while True:
            try:
                await self.jobs.submit(job, request, terms=terms)
            except (QueueFull, RateLimited) as error:
                self.told.append(Refused(job=job, code=error.code))
                return False
            except Unavailable:
                await asyncio.sleep(_LOOK_S)
            else:
                self.told.append(Accepted(job=job, owner=owner, images=request.num_images))
                return True

    def orders(self, jobs: Iterable[str], gap_s: float = 0.02, **parameters: Any) -> asyncio.Task[None]:
        """One after another, at random distances, in the background."""

        async def run() -> None:
            for job in jobs:
                await self.order(job, **parameters)
                await asyncio.sleep(self.random.expovariate(1 / gap_s))

        task = asyncio.create_task(run())
        self._tasks.append(task)
        return task

    async def ended(self, within_s: float = 180.0) -> None:
        """Every job that was accepted has ended, or was lost."""
        async with asyncio.timeout(within_s):
            while await self.inside._redis.zcard("tandem:deadlines"):  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_S)

    async def seen(self, job: str, condition: Callable[[Job], bool]) -> Job:
        """The job as soon as one of its events finds it so."""
        async for _ in follow(self.inside, job, previews=False):
            found = await self.inside.get(job)
            if condition(found):
                return found
        raise AssertionError(f"{job} has ended before")

    async def job(self, job: str) -> Job:
        """As it is when it has ended."""
        async for _ in follow(self.inside, job, previews=False):
            pass
        return await self.inside.get(job)

    # What strikes.

    async def moment(self, least_s: float, most_s: float) -> None:
        await asyncio.sleep(self.random.uniform(least_s, most_s))

    def kill_a_worker(self, spared: int = 0) -> None:
        """Any but the first `spared` ones."""
        self.fleet.tell(self.random.choice(self.fleet.processes[spared:]), signal.SIGKILL)

    async def restart_redis(self, away_s: float) -> None:
        """kill -9, and the same files again."""
        await asyncio.to_thread(self.redis.kill)
        await asyncio.sleep(away_s)
        await asyncio.to_thread(self.redis.start)
        self.outages.append(time.time())

    @contextlib.asynccontextmanager
    async def outage(self, proxy: TcpProxy) -> AsyncIterator[TcpProxy]:
        """What the block does to the proxy ends with it."""
        try:
            yield proxy
        finally:
            await asyncio.to_thread(proxy.mend)
            self.outages.append(time.time())

    # What comes of it.

    async def history(self) -> list[Entry]:
        puts = puts_of_bucket(self.s3.client, self.s3.bucket) if self.s3 else puts_of_folder(self.folder / "images")
        return await collected(self.inside, [*self.told, *self.words()], puts)

    def words(self) -> list[Heard | Late]:
        """What the workers were told, in the order in which they spoke."""
        words = [word for path in self.folder.glob("words-*.jsonl") for word in read(path)]
        return sorted((word for word in words if isinstance(word, Heard | Late)), key=lambda word: word.asked)

    def holders(self) -> dict[BaseProcess, set[tuple[str, int]]]:
        """Workers that hold jobs just now, and under which claims, by what they were told."""
        found: dict[BaseProcess, set[tuple[str, int]]] = {}
        for process in self.fleet.processes:
            path = self.folder / f"words-{process.name}.jsonl"
            words = [word for word in read(path) if isinstance(word, Heard | Late)] if path.exists() else []
            over = {(w.job, w.fence) for w in words if isinstance(w, Late) or w.what not in ("claimed", "renewed")}
            if held := {(word.job, word.fence) for word in words} - over:
                found[process] = held
        return found

    def taken(self, claims: Iterable[tuple[str, int]]) -> bool:
        """Whether a worker was told that it has a job of these, which was another's under such a claim."""
        claimed = {(word.job, word.fence) for word in self.words() if word.what == "claimed"}
        return any((job, fence + 1) in claimed for job, fence in claims)


def a_small_request(model: str, **parameters: Any) -> ImageRequest:
    """A tenth of a second of work."""
    values: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 1.0, "seed": 1}
    return ImageRequest(**({"model": model} | values | parameters))


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port
    return port


def moved(url: str, port: int) -> str:
    """The same server's URL through a proxy."""
    return url.replace(f":{port_of(url)}/", f":{port}/")


async def until(condition: Any, within_s: float) -> None:
    """Of what is in other processes; there is nothing to subscribe to."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)
