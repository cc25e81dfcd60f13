"""Many at once against the real server: those who hang up, and those who are refused."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Iterator

import psutil
import pytest
import redis
from support.chaos_hang_ups import HangUps
from support.chaos_report import Verdict
from support.chaos_server import Site, an_order
from support.history import Accepted

pytestmark = [pytest.mark.anyio, pytest.mark.chaos, pytest.mark.cluster, pytest.mark.timeout(1800)]

HANG_UPS = int(os.environ.get("CHAOS_HANG_UPS", "10000"))
MAX_QUEUED = 50
RESULT_TTL_S = 20
THREADS = min(32, (os.cpu_count() or 1) + 4)
"""Of the pool that asyncio fills one by one."""
POOLS = 64 + 32 + 2
"""Connections that the ingress may keep: to the job Redis, to the cache, and the two that listen."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Iterator[Site]:
    """Records are short-lived, so that what is left over can be seen."""
    site = Site(
        tmp_path_factory.mktemp("site"),
        seed,
        TANDEM_JOBS__MAX_QUEUED=str(MAX_QUEUED),
        TANDEM_JOBS__RESULT_TTL_S=str(RESULT_TTL_S),
    )
    yield site
    site.close()


def measured(site: Site, client: redis.Redis) -> dict[str, float]:
    """What the server holds just now."""
    processes = [psutil.Process(pid) for pid in site.pids("Ingress") + site.pids("ProxyActor")]
    links = [link for process in processes for link in process.net_connections("tcp") if link.raddr]
    to_redis = sum(link.raddr.port in (site.to_redis.port, site.to_cache.port) for link in links)
    return {
        "ingress": rss_mib(site.pids("Ingress")),
        "proxy": rss_mib(site.pids("ProxyActor")),
        "to_redis": to_redis,
        "files": sum(process.num_fds() for process in processes) - to_redis,
        "threads": sum(process.num_threads() for process in processes),
        "channels": len(client.pubsub_channels("tandem:events:*")),
    }


def rss_mib(pids: list[int]) -> float:
    return sum(psutil.Process(pid).memory_info().rss for pid in pids) / 2**20


@pytest.mark.scenario(11, f"{HANG_UPS} clients hang up in mid-request")
async def test_11_hang_ups_leave_nothing(site: Site, verdict: Verdict) -> None:
    hang_ups = HangUps(site.server.url, seed=1)
    with redis.Redis.from_url(site.redis.url) as client:
        await settled(site, client, hang_ups, HANG_UPS // 5)  # pools fill, modules are imported
        before = measured(site, client)
        began = time.monotonic()
        await settled(site, client, hang_ups, HANG_UPS)
        after = measured(site, client)
        left = {key for key in client.scan_iter("tandem:*") if b":job:" in key or b":events:" in key}
    note = (
        f"memory of the ingress {before['ingress']:.0f} -> {after['ingress']:.0f} MiB, of Serve's proxy "
        f"{before['proxy']:.0f} -> {after['proxy']:.0f} MiB, files {before['files']:.0f} -> "
        f"{after['files']:.0f}, threads {before['threads']:.0f} -> {after['threads']:.0f}, connections to Redis "
        f"{before['to_redis']:.0f} -> {after['to_redis']:.0f}, channels {after['channels']:.0f}, records and "
        f"streams {len(left)}; {time.monotonic() - began:.0f} s"
    )
    site.told = []
    async with site.client() as http:
        await site.order(http)
    await site.ended()
    verdict.of(HANG_UPS, await site.history(), note=note)
    assert left == set()
    assert after["channels"] == 0
    assert after["files"] <= before["files"] + 20
    assert after["to_redis"] <= POOLS
    assert after["threads"] <= before["threads"] + THREADS
    assert after["ingress"] <= before["ingress"] + 20
    assert after["proxy"] <= before["proxy"] + 20


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


@pytest.mark.scenario(10, "orders to a full queue")
async def test_10_refusals_under_a_full_queue_are_quick(site: Site, verdict: Verdict) -> None:
    # So long that none ends meanwhile: its record would be gone before the history is read.
    order = an_order(num_inference_steps=150, width=256, height=256, num_images=8)
    jobs: list[str] = []
    async with site.client() as http:

        async def refused(took: list[float], count: int) -> None:
            for _ in range(count):
                began = time.perf_counter()
                answer = await http.post("/v1/jobs", json=order)
                if answer.status_code == 202:  # a place was free just then
                    jobs.append(answer.json()["id"])
                    continue
                took.append(1000 * (time.perf_counter() - began))
                assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "false"), answer.text
                assert int(answer.headers["retry-after"]) >= 1

        fill: list[float] = []
        while not fill:
            await refused(fill, 1)
        one: list[float] = []
        await refused(one, 500)
        four: list[float] = []
        await asyncio.gather(*(refused(four, 250) for _ in range(4)))
        for job in jobs:
            await http.delete(f"/v1/jobs/{job}")
    site.told += [Accepted(job=job, images=8) for job in jobs]
    await site.ended()
    note = f"one client {quantiles(one)}, four at once {quantiles(four)}"
    verdict.of(len(one) + len(four), await site.history(), note=note)
    assert statistics.quantiles(one, n=100)[98] < 50


def quantiles(took: list[float]) -> str:
    return f"P50 {statistics.median(took):.0f} ms, P99 {statistics.quantiles(took, n=100)[98]:.0f} ms"
