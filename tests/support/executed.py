"""The chart's `heterogeneous` release with what a test machine can hold: the shipped model in the place of the hub's,
one replica of each placement, Redis and S3 of the test's own. Classes, labels, groups and reservations stay."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from pydantic import SecretStr
from support.chaos import AWS, S3
from support.chaos_collect import PREFIX, collected, puts_of_bucket
from support.chart import CHART, Rendered, over, put, render, values_of
from support.history import Entry, violations
from support.kube_service import KubeService
from support.pods import Ground, Pod
from support.ray_clusters import START_S, RayCluster
from support.server import ready, wait_until
from support.traffic import Traffic

from serve.embedded import EmbeddedRedis
from serve.jobs.store import JobStore
from serve.settings.stores import JobSettings
from serve.telemetry.metrics import InProcessMetrics
from serve.urls import place_of

LEASE_S = 3.0
SMALL, LARGE = 128, 192
"""Sides of images: the 4 GB class holds no more than the smaller one."""
NODES = {"gpu-11gb": 2}
"""One for the whole card that `xl` wants, one for the shares; of the other groups one, as the chart starts them."""
FIRST_KEY = f"tdm_{'c' * 12}_{secrets.token_hex(21)}x"
MODELS: dict[tuple[str, ...], Any] = {
    ("config", "model"): {"source": "shapes", "name": "sd15"},
    ("config", "models"): [{"source": "shapes", "name": "sdxl"}],
    ("config", "text_models"): [],
    ("config", "encoders"): {},
}
TOP: dict[str, Any] = {
    "config": {
        "diffusion": {"device": "cpu", "torch_threads": 1, "profile_s": 0, "drain_s": 30},
        "jobs": {"lease_s": LEASE_S, "retry_backoff_s": 1},
        "placements": {
            "sd-small": {"replicas": 1, "max_pixels": SMALL * SMALL},
            "sd-large": {"replicas": 1, "max_pixels": LARGE * LARGE},
            "xl": {"replicas": 1, "max_pixels": LARGE * LARGE},
        },
    },
    "ray": {"head": {"shm": "128Mi"}},
    "workerDefaults": {"shm": "128Mi"},
    "keys": {"existingSecret": "made-key"},
}

CLASSES: Mapping[str, str | None] = {
    "Ingress": None,
    "TextEncoder-clip-128x2": None,
    "Diffusion-sd-small": "4gb",
    "Diffusion-sd-large": "11gb",
    "Diffusion-xl": "11gb",
}
"""Of each deployment's nodes; None are those without GPUs."""
ORDERS = [
    {"prompt": f"a {colour} circle", "model": model, "width": side, "height": side, "num_inference_steps": 6}
    for colour in ("red", "blue", "green")
    for model, side in (("sd15", SMALL), ("sdxl", LARGE), ("sd15", LARGE), ("sd15", SMALL))
]


@dataclass(frozen=True)
class Stores:
    """What a release stands on, outside its cluster: three Redis servers and a bucket."""

    folder: Path
    jobs: EmbeddedRedis
    cache: EmbeddedRedis
    gcs: EmbeddedRedis
    s3: S3

    def ground(self) -> Ground:
        password = self.gcs.url.removeprefix("redis://:").partition("@")[0]
        return Ground(self.folder, {"made-gcs": {"password": password}, "made-key": {"key": FIRST_KEY}})

    def values(self, **settings: Any) -> dict[str, Any]:
        values = values_of(CHART / "ci" / "heterogeneous-values.yaml")
        for path, value in MODELS.items():
            values = put(values, path, value)
        own = {
            "s3": {
                "bucket": self.s3.bucket,
                "prefix": PREFIX,
                "endpointUrl": f"http://127.0.0.1:{self.s3.port}",
                "region": AWS["region_name"],
                "accessKeyId": AWS["aws_access_key_id"],
                "secretAccessKey": AWS["aws_secret_access_key"],
            },
            "redis": {
                "jobs": {"enabled": False, "url": self.jobs.url},
                "cache": {"enabled": False, "url": self.cache.url},
                "gcs": {"enabled": False, "address": place_of(self.gcs.url), "existingSecret": "made-gcs"},
            },
        }
        return over(over(over(values, TOP), own), {"config": settings})

    def release(self, **settings: Any) -> Rendered:
        """`settings` are `config` beside the tests' own."""
        return render(self.values(**settings))

    @contextlib.asynccontextmanager
    async def store(self) -> Any:
        store = JobStore(JobSettings(redis_url=SecretStr(self.jobs.url)), InProcessMetrics())
        try:
            yield store
        finally:
            await store.close()

    async def history(self, entries: list[Entry]) -> list[Entry]:
        """Of what clients were told."""
        jobs = {getattr(entry, "job", "") for entry in entries}
        puts = [put for put in puts_of_bucket(self.s3.client, self.s3.bucket) if put.key.partition("/")[0] in jobs]
        async with self.store() as store:
            return await collected(store, entries, puts)


@contextlib.contextmanager
def stores(folder: Path) -> Iterator[Stores]:
    with contextlib.ExitStack() as stack:
        s3 = S3()
        stack.callback(s3.stop)
        yield Stores(
            folder,
            stack.enter_context(EmbeddedRedis(folder / "jobs", "jobs")),
            stack.enter_context(EmbeddedRedis(folder / "cache", "cache", 64 << 20)),
            stack.enter_context(EmbeddedRedis(folder / "gcs", "jobs", told=False)),
            s3,
        )


@dataclass
class Site:
    """The release on a cluster, behind its service."""

    stores: Stores
    cluster: RayCluster
    service: KubeService

    def traffic(self, users: int = 4, model: str | None = None) -> Traffic:
        """Of all kinds of orders, or those of one model."""
        orders = [order for order in ORDERS if model in (None, order["model"])]
        return Traffic(self.service.url, FIRST_KEY, orders, users)

    def whole(self) -> bool:
        """Every pod is there and every deployment has its replicas. Who asks heals what has ended."""
        self.cluster.heal()
        there = self.cluster.running() and len(self.cluster.nodes()) == 1 + len(self.cluster.workers)
        return there and ready(self.service.url)

    def wait(self) -> None:
        wait_until(self.whole, START_S, "the release to be whole")

    def replica_pids(self) -> set[int]:
        return {each.pid for each in self.cluster.processes("ServeReplica:")}

    def holder(self, group: str) -> Pod:
        """A pod of the group whose replica has a job in hand just now; it is waited for."""
        found: list[Pod] = []

        def look() -> bool:
            nodes = self.cluster.nodes()
            with redis.Redis.from_url(self.stores.jobs.url) as jobs:
                held = jobs.zrange("tandem:leases", 0, -1)
                claims = [jobs.hget(b"tandem:job:" + job, "claim") or b"" for job in held]
            busy = [nodes[node] for node in nodes if any(claim.startswith(node.encode()) for claim in claims)]
            found[:] = [pod for pod in busy if pod.group == group]
            return bool(found)

        wait_until(look, 60, f"a job in hand on {group}")
        return found[0]

    def holds(self, traffic: Traffic, *, repeated: bool = False) -> None:
        """Nothing was lost or done twice, every job succeeded; no request failed, unless it might (`repeated`)."""
        assert repeated or traffic.troubles == []
        assert {each.job["state"] for each in traffic.done} == {"succeeded"}
        assert len(traffic.done) == len(traffic.told)
        assert violations(asyncio.run(self.stores.history(traffic.told))) == []


@contextlib.contextmanager
def a_site(folder: Path, **settings: Any) -> Iterator[Site]:
    """One that serves; `settings` are `config` beside the tests' own."""
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(stores(folder))
        cluster = stack.enter_context(RayCluster(own.release(**settings), own.ground(), NODES))
        service = stack.enter_context(KubeService(cluster))
        cluster.put()
        found = Site(own, cluster, service)
        found.wait()
        yield found
