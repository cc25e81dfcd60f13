"""The memory of every process of a site, looked at again and again."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import psutil
import redis
from support.executed import Site
from support.server import title

LOOK_S = 5.0
TITLES = {
    "diffusion replica": "ServeReplica:tandem:Diffusion",
    "encoder replica": "ServeReplica:tandem:TextEncoder",
    "ingress replica": "ServeReplica:tandem:Ingress",
    "proxy": "ProxyActor",
    "controller": "ServeController",
}
"""Of processes, by the title that Ray gives them."""


@dataclass(frozen=True, slots=True)
class Use:
    """Memory of one process at one time, in MiB; of Redis what it says that it uses. `age_s` is the process' own."""

    kind: str
    process: str
    at: float
    age_s: float
    mib: float


class Watch:
    """Looks at the memory of everything every LOOK_S.

    Owns: the thread that looks.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self.uses: list[Use] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            self.uses += self._look()

    def _look(self) -> list[Use]:
        now, found = time.time(), []
        for pod in (self._site.cluster.head, *self._site.cluster.workers):
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in pod.processes():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        memory = process.memory_info()
                        kind = kind_of(title(process), process.name())
                        if kind:
                            began = process.create_time()
                            mib = (memory.rss - memory.shared) / 2**20
                            found.append(Use(kind, f"{process.pid}-{began}", now, now - began, mib))
        stores = self._site.stores
        for kind, server in (("job Redis", stores.jobs), ("cache Redis", stores.cache), ("GCS Redis", stores.gcs)):
            with contextlib.suppress(redis.RedisError), redis.Redis.from_url(server.url) as client:
                info = client.info()
                found.append(Use(kind, info["run_id"], now, info["uptime_in_seconds"], info["used_memory"] / 2**20))
        return found


def kind_of(words: str, name: str) -> str | None:
    """Of a process of a pod; None for those of Ray that come and go."""
    for kind, part in TITLES.items():
        if part in words:
            return kind
    if name in ("raylet", "gcs_server"):
        return name
    for part, kind in (("dashboard/agent.py", "dashboard agent"), ("dashboard/dashboard.py", "dashboard")):
        if part in words:
            return kind
    return None


def slope(uses: Sequence[Use], settled_s: float = 60.0) -> float | None:
    """MiB an hour that a process grows by, once it is so old: least squares of memory over age, with a level of its own
    for each process. None where nobody lived long enough."""
    by_process: dict[str, list[Use]] = {}
    for use in uses:
        if use.age_s >= settled_s:
            by_process.setdefault(use.process, []).append(use)
    above = below = 0.0
    for each in by_process.values():
        age, mib = (sum(values) / len(each) for values in ([u.age_s for u in each], [u.mib for u in each]))
        above += sum((use.age_s - age) * (use.mib - mib) for use in each)
        below += sum((use.age_s - age) ** 2 for use in each)
    return 3600 * above / below if below else None


def middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def by(kind: Callable[[Use], str], uses: Sequence[Use]) -> dict[str, list[Use]]:
    found: dict[str, list[Use]] = {}
    for use in uses:
        found.setdefault(kind(use), []).append(use)
    return found
