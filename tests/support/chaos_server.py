"""The whole server as `tandem up` starts it, with Redis and S3 behind proxies, and clients over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from pydantic import SecretStr
from support.chaos import S3, moved, port_of
from support.chaos_collect import collected, puts_of_bucket
from support.history import Accepted, Entry, Refused
from support.server import Server, launch, title
from support.tcp_proxy import TcpProxy

from serve.embedded import EmbeddedRedis
from serve.jobs.store import JobStore
from serve.settings.stores import JobSettings
from serve.telemetry.metrics import InProcessMetrics

LEASE_S = 3.0
REFUSED = ("queue_full", "rate_limited")


class Site:
    """Owns: the servers, the proxies, and `tandem up` with everything that it starts."""

    def __init__(self, folder: Path, seed: int, **environment: str) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self._stack = contextlib.ExitStack()
        self.redis = self._stack.enter_context(EmbeddedRedis(folder / "own", "jobs"))
        self.cache = self._stack.enter_context(EmbeddedRedis(folder / "own", "cache", 64 << 20))
        self.s3 = S3()
        self._stack.callback(self.s3.stop)
        self.to_redis = self._stack.enter_context(TcpProxy(port_of(self.redis.url), seed))
        self.to_cache = self._stack.enter_context(TcpProxy(port_of(self.cache.url), seed + 1))
        self.to_s3 = self._stack.enter_context(TcpProxy(self.s3.port, seed + 2))
        s3 = self.s3.settings(self.to_s3.port)["s3"]
        self._environment = {
            "TANDEM_JOBS__REDIS_URL": moved(self.redis.url, self.to_redis.port),
            "TANDEM_CACHE__REDIS_URL": moved(self.cache.url, self.to_cache.port),
            "TANDEM_RESULTS__STORE": "s3",
            **{f"TANDEM_RESULTS__S3__{name.upper()}": value for name, value in s3.items()},
            "TANDEM_JOBS__LEASE_S": str(LEASE_S),
            "TANDEM_JOBS__RETRY_BACKOFF_S": "1",
            "TANDEM_DIFFUSION__REPLICAS": "2",
            "TANDEM_DIFFUSION__TORCH_THREADS": "1",
            "TANDEM_DIFFUSION__PROFILE_S": "0",
            **environment,
        }
        self.told: list[Entry] = []
        self.outages: list[float] = []
        self.start()

    def start(self) -> None:
        self.server: Server = launch(self.folder, **self._environment)

    def stop(self) -> None:
        """SIGTERM. Now and then Ray's driver aborts as it ends, and leaves agents behind: those are ended here."""
        if self.server.process.poll() is None:
            family = psutil.Process(self.server.process.pid).children(recursive=True)
            self.server.process.send_signal(signal.SIGTERM)
            self.server.process.wait(60)
            _, left = psutil.wait_procs(family, timeout=5)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def close(self) -> None:
        self.stop()
        self._stack.close()

    # What strikes.

    def pids(self, name: str) -> list[int]:
        """Of the replicas of a deployment, or of the proxy (`ProxyActor`)."""
        family = psutil.Process(self.server.process.pid).children(recursive=True)
        part = name if name == "ProxyActor" else f"ServeReplica:tandem:{name}"
        return sorted(process.pid for process in family if part in title(process))

    def controller_log(self) -> Path:
        """Of Serve's controller, among Ray's logs."""
        for process in psutil.Process(self.server.process.pid).children(recursive=True):
            if "ServeController" in title(process):
                for file in process.open_files():
                    if Path(file.path).name.startswith("controller_"):
                        return Path(file.path)
        raise AssertionError("Serve's controller keeps no log")

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int | None:
        """One of them, by chance; None while there is none."""
        if not (pids := self.pids(name)):
            return None
        pid = self.random.choice(pids)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return pid

    async def holders(self) -> list[int]:
        """Diffusion replicas that have a job in hand, by the workers' names in the jobs' records."""
        async with self.inside() as store:
            jobs = await store._redis.zrange("tandem:leases", 0, -1)
            claims = [await store._redis.hget(f"tandem:job:{job.decode()}", "claim") or b"" for job in jobs]
        return [pid for pid in self.pids("Diffusion") if any(f":{pid}:".encode() in claim for claim in claims)]

    async def moment(self, least_s: float, most_s: float) -> None:
        await asyncio.sleep(self.random.uniform(least_s, most_s))

    @contextlib.contextmanager
    def outage(self, proxy: TcpProxy) -> Iterator[TcpProxy]:
        """What the block does to the proxy ends with it."""
        try:
            yield proxy
        finally:
            proxy.mend()
            self.outages.append(time.time())

    # What clients do.

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.server.url, timeout=30, limits=httpx.Limits(max_connections=200))

    async def order(self, http: httpx.AsyncClient, **body: Any) -> str:
        """PUT under an id of the client's own until there is a yes or a no."""
        job, order = uuid.uuid4().hex, an_order(**body)
        while True:
            try:
                answer = await http.put(f"/v1/jobs/{job}", json=order)
            except httpx.HTTPError:
                await asyncio.sleep(0.2)
                continue
            if answer.status_code in (200, 202):
                assert answer.json()["id"] == job
                self.told.append(Accepted(job=job, images=order.get("num_images", 1)))
                return job
            code = answer.json().get("error", {}).get("code", "") if "json" in answer.headers["content-type"] else ""
            if code in REFUSED:
                self.told.append(Refused(job=job, code=code))
                return job
            assert answer.status_code >= 500, answer.text
            await asyncio.sleep(0.2)

    def orders(self, count: int, gap_s: float, **body: Any) -> asyncio.Task[list[str]]:
        """At random distances, in the background."""

        async def run() -> list[str]:
            async with self.client() as http, asyncio.TaskGroup() as group:
                tasks = []
                for number in range(count):
                    tasks.append(group.create_task(self.order(http, prompt=f"a red circle {number}", **body)))
                    await asyncio.sleep(self.random.expovariate(1 / gap_s))
            return [task.result() for task in tasks]

        return asyncio.create_task(run())

    # What comes of it.

    @contextlib.asynccontextmanager
    async def inside(self) -> Any:
        """The job store, past the proxy."""
        store = JobStore(JobSettings(redis_url=SecretStr(self.redis.url)), InProcessMetrics())
        try:
            yield store
        finally:
            await store.close()

    async def ended(self, within_s: float = 240.0) -> None:
        async with self.inside() as store, asyncio.timeout(within_s):
            while await store._redis.zcard("tandem:deadlines"):  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    async def history(self) -> list[Entry]:
        """Of what clients were told since the last time."""
        told, self.told = list(dict.fromkeys(self.told)), []
        jobs = {getattr(entry, "job", "") for entry in told}
        puts = [put for put in puts_of_bucket(self.s3.client, self.s3.bucket) if put.key.partition("/")[0] in jobs]
        async with self.inside() as store:
            return await collected(store, told, puts)


def an_order(**body: Any) -> dict[str, Any]:
    """A tenth of a second of work."""
    small = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 4, "guidance_scale": 1.0}
    return small | {"seed": 1} | body
