"""Many at once against the real server: those who hang up, and those who are refused."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections.abc import Iterator

import psutil
import pytest
import redis
from support.chaos_hang_ups import HangUps
from support.chaos_report import judged
from support.chaos_server import Site, an_order
from support.history import Accepted

pytestmark = [pytest.mark.anyio, pytest.mark.chaos, pytest.mark.cluster, pytest.mark.timeout(1800)]

HANG_UPS = int(os.environ.get("CHAOS_HANG_UPS", "10000"))
MAX_QUEUED = 50
RESULT_TTL_S = 20


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Records are short-lived, so that what is left over can be seen."""
    site = Site(
        tmp_path_factory.mktemp("site"),
        int(os.environ.get("CHAOS_SEED") or random.randrange(10**6)),
        TANDEM_JOBS__MAX_QUEUED=str(MAX_QUEUED),
        TANDEM_JOBS__RESULT_TTL_S=str(RESULT_TTL_S),
    )
    yield site
    site.close()


def measured(site: Site, client: redis.Redis) -> dict[str, float]:
    """What the server holds just now."""
    pids = site.pids("Ingress") + site.pids("ProxyActor")
    return {
        "MiB": sum(psutil.Process(pid).memory_info().rss for pid in pids) / 2**20,
        "files": sum(psutil.Process(pid).num_fds() for pid in pids),
        "threads": sum(psutil.Process(pid).num_threads() for pid in pids),
        "channels": len([name for name in client.pubsub_channels("tandem:*") if name != b"tandem:work"]),
        "redis_clients": len(client.client_list()),
    }


async def test_11_hang_ups_leave_nothing(site: Site) -> None:
    hang_ups = HangUps(site.server.url, seed=1)
    with redis.Redis.from_url(site.redis.url) as client:
        await settled(site, client, hang_ups, max(HANG_UPS // 20, 50))  # pools fill, modules are imported
        before = measured(site, client)
        began = time.monotonic()
        await settled(site, client, hang_ups, HANG_UPS)
        after = measured(site, client)
        left = {key for key in client.scan_iter("tandem:*") if b":job:" in key or b":events:" in key}
    note = (
        f"memory of ingress and proxy {before['MiB']:.0f} -> {after['MiB']:.0f} MiB, files {before['files']:.0f} -> "
        f"{after['files']:.0f}, threads {before['threads']:.0f} -> {after['threads']:.0f}, Redis connections "
        f"{before['redis_clients']:.0f} -> {after['redis_clients']:.0f}, channels {after['channels']:.0f}, records and "
        f"streams {len(left)}; {time.monotonic() - began:.0f} s"
    )
    site.told = []
    async with site.client() as http:
        await site.order(http)
    await site.ended()
    judged(11, f"{HANG_UPS} clients hang up in mid-request", HANG_UPS, await site.history(), note=note)
    assert left == set()
    assert after["channels"] == 0
    assert after["files"] <= before["files"] + 20
    assert after["threads"] <= before["threads"] + 4
    assert after["redis_clients"] <= before["redis_clients"] + 4
    assert after["MiB"] <= before["MiB"] + 40


async def settled(site: Site, client: redis.Redis, hang_ups: HangUps, count: int) -> None:
    """Hang up so often, then wait until the server has found out: every job ended, its record's time over."""
    async with site.client() as http:
        long = (await http.post("/v1/jobs", json=an_order(num_inference_steps=150, width=256, height=256))).json()["id"]
        await hang_ups.many(count, long)
        await http.delete(f"/v1/jobs/{long}")
    async with asyncio.timeout(300):
        while client.zcard("tandem:records") or client.pubsub_channels("tandem:events:*"):  # noqa: ASYNC110
            await asyncio.sleep(0.5)
        await asyncio.sleep(2 * 15)  # an event stream finds out at its next heartbeat


async def test_10_refusals_under_a_full_queue_are_quick(site: Site) -> None:
    order = an_order(num_inference_steps=150, width=256, height=256, num_images=4)
    took: list[float] = []
    async with site.client() as http:
        jobs = []
        while True:
            answer = await http.post("/v1/jobs", json=order)
            if answer.status_code == 503:
                break
            jobs.append(answer.json()["id"])

        async def refused() -> None:
            for _ in range(250):
                began = time.perf_counter()
                answer = await http.post("/v1/jobs", json=order)
                if answer.status_code == 202:  # a place was free just then
                    jobs.append(answer.json()["id"])
                    continue
                took.append(1000 * (time.perf_counter() - began))
                assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "false"), answer.text
                assert int(answer.headers["retry-after"]) >= 1

        await asyncio.gather(*(refused() for _ in range(4)))
        for job in jobs:
            await http.delete(f"/v1/jobs/{job}")
    site.told += [Accepted(job=job, images=4) for job in jobs]
    await site.ended()
    p50, p99 = statistics.median(took), statistics.quantiles(took, n=100)[98]
    note = f"{len(took)} refusals by 4 clients, P50 {p50:.1f} ms, P99 {p99:.1f} ms"
    judged(10, "orders to a full queue", len(took), await site.history(), note=note)
    assert p99 < 50
