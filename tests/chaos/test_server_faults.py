"""Faults of `docs/reliability.md` against the real server: `tandem up`, its Ray, its replicas, its HTTP."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator

import httpx
import pytest
from support.chaos_report import Verdict, unlucky
from support.chaos_server import LEASE_S, Site, an_order
from support.history import Accepted

from serve.domain.jobs import JobState

pytestmark = [pytest.mark.anyio, pytest.mark.chaos, pytest.mark.cluster, pytest.mark.timeout(900)]

ALL = {JobState.SUCCEEDED}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Iterator[Site]:
    """One server for the faults that it survives, with two replicas of everything."""
    site = Site(
        tmp_path_factory.mktemp("site"),
        seed,
        TANDEM_ENCODER__MIN_REPLICAS="2",
        TANDEM_ENCODER__MAX_REPLICAS="2",
        TANDEM_HTTP__REPLICAS="2",
        TANDEM_JOBS__MAX_QUEUED="1000",
        # A replica that hangs keeps its CPUs until the grace is over, and two cores have room for no third.
        TANDEM_DIFFUSION__DRAIN_S="10",
    )
    yield site
    site.close()


@pytest.mark.parametrize(
    ("stays", "count"),
    [
        pytest.param(False, 200, marks=pytest.mark.scenario(1, "whole server: kill -9 of diffusion replicas")),
        pytest.param(True, 100, marks=pytest.mark.scenario(1, "whole server: kill -9, one replica of two stays up")),
    ],
)
async def test_1_diffusion_replicas_are_killed(site: Site, verdict: Verdict, stays: bool, count: int) -> None:
    """Each with a job in hand. A replica that is just starting counts as one of two: so without one that stays up,
    nobody may be there."""
    while len(site.pids("Diffusion")) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.2)
    spared = site.pids("Diffusion")[0] if stays else None
    orders, strikes = site.orders(count, gap_s=0.35, num_inference_steps=24), 0
    while not orders.done():
        await site.moment(5.0, 9.0)
        holders = [pid for pid in await site.holders() if pid != spared]
        while not (holders and len(site.pids("Diffusion")) == 2) and not orders.done():
            await asyncio.sleep(0.02)
            holders = [pid for pid in await site.holders() if pid != spared]
        if holders:
            os.kill(site.random.choice(holders), signal.SIGKILL)
            strikes += 1
    await orders
    await site.ended()
    history = await site.history()
    ends = verdict.of(strikes, history, lease_s=LEASE_S if stays else None)
    assert unlucky(history)
    assert ends[JobState.SUCCEEDED] >= 0.95 * count


@pytest.mark.scenario(2, "kill -9 of one text encoder and of all")
async def test_2_encoder_replicas_are_killed(site: Site, verdict: Verdict) -> None:
    orders, strikes = site.orders(120, gap_s=0.3), 0
    while not orders.done():
        await site.moment(4.0, 8.0)
        # One of them, and the next time all.
        for pid in site.pids("TextEncoder")[: 1 if strikes % 3 else None]:
            os.kill(pid, signal.SIGKILL)
            strikes += 1
    await orders
    await site.ended()
    assert verdict.of(strikes, await site.history()).keys() == ALL


@pytest.mark.scenario(3, "kill -9 of ingress replicas and of the proxy")
async def test_3_ingress_replicas_and_the_proxy_are_killed(site: Site, verdict: Verdict) -> None:
    orders, strikes = site.orders(120, gap_s=0.4), 0
    while not orders.done():
        await site.moment(5.0, 9.0)
        strikes += site.kill("ProxyActor" if strikes % 3 == 2 else "Ingress") is not None
    jobs = await orders
    await site.ended()
    async with site.client() as http:
        for job in random.Random(1).sample(jobs, 10):
            assert await state_of(http, job) == "succeeded"
    assert verdict.of(strikes, await site.history()).keys() == ALL


@pytest.mark.scenario(5, "whole server: job Redis killed and restarted, silent; S3 and the cache cut off")
async def test_5_and_6_redis_and_s3_go_away(site: Site, verdict: Verdict) -> None:
    orders, strikes = site.orders(150, gap_s=0.3), 0
    while not orders.done():
        await site.moment(3.0, 5.0)
        strikes += 1
        match strikes % 4:
            case 0:
                await asyncio.to_thread(site.redis.kill)
                await site.moment(0.5, 3.0)
                await asyncio.to_thread(site.redis.start)
                site.outages.append(time.time())
            case 1:
                with site.outage(site.to_s3) as proxy:
                    proxy.cut()
                    await site.moment(1.0, 5.0)
            case 2:
                with site.outage(site.to_redis) as proxy:
                    proxy.stalled = True
                    await site.moment(1.0, 5.0)
            case _:
                with site.outage(site.to_cache) as proxy:
                    proxy.cut()
                    await site.moment(1.0, 5.0)
    await orders
    await site.ended()
    outages, site.outages = site.outages, []
    assert verdict.of(strikes, await site.history(), outages=outages).keys() == ALL


@pytest.mark.scenario(14, "diffusion replica that hangs (SIGSTOP)")
async def test_14_a_replica_that_hangs_is_replaced(site: Site, verdict: Verdict) -> None:
    """It has a job in hand. Serve's controller writes into its log that it holds a replica for unhealthy; its grace
    begins then."""
    orders = site.orders(60, gap_s=0.5, num_inference_steps=100)
    await site.moment(2.0, 4.0)
    log = site.controller_log()
    read = log.stat().st_size
    while not (holders := await site.holders()):  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    hung, began = site.random.choice(holders), time.monotonic()
    os.kill(hung, signal.SIGSTOP)
    after_s: dict[str, float] = {}
    while len(after_s) < 3:
        assert time.monotonic() - began < 180, after_s
        pids, told = site.pids("Diffusion"), log.read_bytes()[read:]
        seen = {
            "unhealthy": b"times in a row, marking it unhealthy" in told,
            "killed": hung not in pids,
            "replaced": len({*pids} - {hung}) >= 2,
        }
        after_s |= {name: time.monotonic() - began for name, there in seen.items() if there and name not in after_s}
        await asyncio.sleep(0.1)
    await orders
    await site.ended()
    note = ", ".join(f"{name} after {s:.0f} s" for name, s in after_s.items())
    assert verdict.of(1, await site.history(), note=note, lease_s=LEASE_S).keys() == ALL
    assert after_s["unhealthy"] < 30


@pytest.mark.scenario(19, "one Idempotency-Key 100 times at once, over HTTP")
async def test_19_one_key_a_hundred_times_at_once(site: Site, verdict: Verdict) -> None:
    jobs: set[str] = set()
    async with site.client() as http:
        for number in range(10):
            headers = {"Idempotency-Key": f"key-{number}-{time.time_ns()}"}
            order = an_order(prompt=f"key {number}")
            answers = await asyncio.gather(*(http.post("/v1/jobs", json=order, headers=headers) for _ in range(100)))
            assert {answer.status_code for answer in answers} <= {200, 202}, answers[0].text
            ids = {answer.json()["id"] for answer in answers}
            requests = {str(answer.json()["request"]) for answer in answers}
            assert (len(ids), len(requests)) == (1, 1)
            assert sum("idempotent-replayed" not in answer.headers for answer in answers) >= 1
            jobs |= ids
            other = await http.post("/v1/jobs", json=an_order(prompt="another"), headers=headers)
            assert other.status_code == 422
    site.told += [Accepted(job=job) for job in jobs]
    await site.ended()
    ends = verdict.of(10, await site.history())
    assert ends == {JobState.SUCCEEDED: 10}


async def state_of(http: httpx.AsyncClient, job: str) -> str:
    """Any replica answers for any job, as soon as there is one."""
    for _ in range(100):
        try:
            answer = await http.get(f"/v1/jobs/{job}")
            if answer.status_code == 200:
                return str(answer.json()["state"])
        except httpx.HTTPError:
            pass
        await asyncio.sleep(0.3)
    raise AssertionError("nobody answers")


@pytest.mark.scenario(18, "SIGTERM in mid-run, 2 s of grace")
async def test_18_a_server_that_is_told_to_stop_gives_its_jobs_back_at_once(
    tmp_path_factory: pytest.TempPathFactory, seed: int, verdict: Verdict
) -> None:
    """With much less grace than the jobs need. These are withdrawn then, and the next start draws others."""
    site = Site(tmp_path_factory.mktemp("site"), seed, TANDEM_DIFFUSION__DRAIN_S="2")
    try:
        long = site.orders(6, gap_s=0.05, num_inference_steps=150, width=512, height=512, num_images=4)
        await long
        async with site.inside() as store:
            while await store._redis.zcard("tandem:leases") < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            began = time.monotonic()
            await asyncio.to_thread(site.stop)
            took_s = time.monotonic() - began
            assert await store._redis.zcard("tandem:leases") == 0, "a job waits for its lease to run out"
            states = {(await store.get(job)).state for job in await long}
            assert states == {JobState.QUEUED}
            # They were long for the drain's sake alone.
            for job in await long:
                await store.cancel(job)
        short = await asyncio.to_thread(site.start) or site.orders(20, gap_s=0.05)
        await short
        await site.ended()
        ends = verdict.of(6, await site.history(), note=f"down in {took_s:.0f} s")
        assert ends == {JobState.CANCELLED: 6, JobState.SUCCEEDED: 20}
    finally:
        await asyncio.to_thread(site.close)
