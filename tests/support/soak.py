"""What a soak does to a site: strikes at anything, one after another; and each job's history, read before its record is
swept."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import psutil
from support.chaos_collect import answer, puts_of_bucket, transitions
from support.executed import Site
from support.history import Entry
from support.server import wait_until
from support.soak_watch import TITLES
from support.traffic import Traffic

from serve.embedded import EmbeddedRedis
from serve.errors import TandemError

BACK_S = 240.0
SETTLED_S = 20.0
"""After its end a job's history is read so much later: what still happened to it would be seen."""
KINDS: Mapping[str, float] = {
    "diffusion replica": 6,
    "encoder replica": 4,
    "ingress replica": 4,
    "proxy": 3,
    "controller": 3,
    "worker node": 3,
    "head": 2,
    "job Redis": 3,
    "cache Redis": 3,
}
"""What is struck, and how often in proportion."""


@dataclass(frozen=True, slots=True)
class Strike:
    """`back_s` is the time until everything that was struck was there again and the service ready."""

    kind: str
    at: float
    back_s: float


class Striker:
    """Strikes a site by chance, and waits each time until it is whole."""

    def __init__(self, site: Site, seed: int) -> None:
        self._site, self._random = site, random.Random(seed)
        self.strikes: list[Strike] = []
        self.outages: list[float] = []

    def strike(self) -> None:
        kind = self._random.choices([*KINDS], [*KINDS.values()])[0]
        began = time.time()
        if kind in TITLES:
            self._a_process(TITLES[kind])
        elif kind in ("worker node", "head"):
            self._a_pod(kind)
        else:
            self._a_redis(self._site.stores.jobs if kind == "job Redis" else self._site.stores.cache)
        wait_until(self._site.whole, BACK_S, f"the release to be whole after a struck {kind}")
        self.strikes.append(Strike(kind, began, time.time() - began))
        print(f"{kind}: back in {self.strikes[-1].back_s:.1f} s", flush=True)

    def pause(self, most_s: float) -> None:
        time.sleep(self._random.uniform(0, most_s))

    def _a_process(self, name: str) -> None:
        """-9 to one of them; another has come in its place, or had to, before this ends."""
        before = {each.pid for each in self._site.cluster.processes(name)}
        struck = self._random.choice(sorted(before))
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(struck).send_signal(signal.SIGKILL)

        def another() -> bool:
            there = {each.pid for each in self._site.cluster.processes(name)}
            if "ServeReplica" not in name:
                return bool(there - before)
            # A pool that scales may have shrunk to what is left.
            replicas = [each for group in self._site.cluster.replicas().values() for each in group]
            settled = all(each["state"] == "RUNNING" and each["pid"] != struck for each in replicas)
            return struck not in there and bool(there and replicas) and settled

        wait_until(another, BACK_S, f"another {name}")

    def _a_pod(self, kind: str) -> None:
        cluster = self._site.cluster
        pod = cluster.head if kind == "head" else self._random.choice(cluster.workers)
        pod.kill()
        self.pause(3.0)
        cluster.heal()

    def _a_redis(self, server: EmbeddedRedis) -> None:
        server.kill()
        self.pause(3.0)
        server.start()
        self.outages.append(time.time())


class Recorder:
    """Reads the history of each job that ended, before its record is swept.

    Owns: the thread that does.
    """

    def __init__(self, site: Site, traffic: Traffic) -> None:
        self._site, self._traffic = site, traffic
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._record()), name="recorder", daemon=True)
        self._read = 0
        self._found: list[Entry] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """What is not read by then counts as lost."""
        self._over.set()
        self._thread.join(60)

    def history(self) -> list[Entry]:
        """All of it: what clients were told, what was read, every version of every object."""
        s3 = self._site.stores.s3
        return [*self._traffic.told, *self._found, *puts_of_bucket(s3.client, s3.bucket)]

    async def _record(self) -> None:
        async with self._site.stores.store() as store:
            while not (self._over.is_set() and self._read == len(self._traffic.done)):
                await asyncio.sleep(0.2)
                while self._read < len(self._traffic.done):
                    done = self._traffic.done[self._read]
                    if not self._over.is_set() and time.monotonic() < done.at + SETTLED_S:
                        break
                    try:
                        stream = await transitions(store, done.job["id"])
                        self._found += [*stream, answer(await store.get(done.job["id"]))]
                    except TandemError:
                        break  # the job Redis is away
                    self._read += 1
