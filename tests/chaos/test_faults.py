"""Faults of `docs/reliability.md` against plain processes: workers, two Redis servers and S3, all behind proxies."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import signal
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import redis
from safetensors.torch import load_file, save_file
from support.chaos import LEASE_S, House, until
from support.chaos_report import Verdict, unlucky
from support.chaos_worker import PLACES
from support.history import Answer, spoke_too_late
from support.tcp_proxy import TcpProxy, http_answer

from serve.domain.jobs import JobState
from serve.embedded import EmbeddedRedis
from serve.encoders.redis_tier import PAUSE_S

pytestmark = [pytest.mark.anyio, pytest.mark.chaos, pytest.mark.timeout(600)]

ALL = {JobState.SUCCEEDED}
REFUSALS = (
    http_answer("403 Forbidden", "SlowDown"),
    http_answer("409 Conflict", "ConditionalRequestConflict"),
    http_answer("500 Internal Server Error", "InternalError"),
    http_answer("503 Service Unavailable", "SlowDown"),
)


def names(kind: str, count: int) -> list[str]:
    return [f"{kind}-{number}" for number in range(count)]


@pytest.mark.parametrize(
    "spared",
    [
        pytest.param(0, marks=pytest.mark.scenario(1, "kill -9 of workers at random moments, at times of all three")),
        pytest.param(1, marks=pytest.mark.scenario(1, "kill -9 of workers at random moments, one of three stays up")),
    ],
)
async def test_1_workers_are_killed_at_random_moments(tmp_path: Path, seed: int, verdict: Verdict, spared: int) -> None:
    """Those that strike all leave times when nobody can claim: then a recovery takes as long as a start does."""
    async with House(tmp_path, seed=seed, workers=3) as house:
        orders = house.orders(names("job", 200), gap_s=0.05)
        while not orders.done():
            await house.moment(0.4, 1.2)
            house.kill_a_worker(spared)
        await house.ended()
        history, deaths = await house.history(), house.fleet.deaths
    ends = verdict.of(deaths, history, lease_s=LEASE_S if spared else None)
    assert unlucky(history)
    assert ends[JobState.SUCCEEDED] >= 190


@pytest.mark.scenario(1, "kill -9 as a job begins, in a step, in the VAE, after the image's put, after the manifest's")
async def test_1_workers_die_at_every_place_of_a_job(tmp_path: Path, seed: int, verdict: Verdict) -> None:
    """One at a time, each with neighbours: a job that dies and meets two others that do has no attempt left."""
    async with House(tmp_path, seed=seed, workers=2) as house:
        for job in [job for place in PLACES for job in names(place, 4)]:
            for each in [job, *names(f"beside-{job}", 4)]:
                await house.order(each)
            await house.ended()
        history, deaths = await house.history(), house.fleet.deaths
    assert verdict.of(deaths, history, lease_s=LEASE_S).keys() == ALL


@pytest.mark.scenario(4, "cache Redis away, 500 ms slow, cut inside a value, full, flushed, a bit flipped")
async def test_4_the_cache_is_away_slow_cut_full_flushed_and_wrong(tmp_path: Path, seed: int, verdict: Verdict) -> None:
    """Every text asks Redis, since nothing is kept in memory: half of them are there, half are new. The P99 of each
    fault is compared with that of the same load on the same workers, before."""
    async with House(tmp_path, seed=seed, cache={"memory_bytes": 0}) as house:
        raw = redis.Redis.from_url(house.cache.url)
        asked: list[str] = []

        def full(_: TcpProxy) -> None:
            raw.config_set("maxmemory", 1)
            raw.config_set("maxmemory-policy", "noeviction")

        def flip(proxy: TcpProxy) -> None:
            proxy.flip_over = 1024

        def slow(proxy: TcpProxy) -> None:
            proxy.delay_s = 0.5

        def short(proxy: TcpProxy) -> None:
            proxy.cut_every = 3000

        async def p99_s(kind: str, count: int) -> float:
            """Of the seconds for the text of so many jobs."""
            jobs = names(kind, count)
            for number, job in enumerate(jobs):
                prompt = house.random.choice(asked) if asked and number % 2 else f"a red circle for {job}"
                asked.append(prompt)
                await house.order(job, prompt=prompt)
                await house.moment(0.0, 0.1)
            await house.ended()
            texts = [(await house.inside.get(job)).timings.text_s or 0.0 for job in jobs]
            return statistics.quantiles(texts, n=100, method="inclusive")[98]

        def reads() -> int:
            stats = raw.info("stats")
            return int(stats["keyspace_hits"]) + int(stats["keyspace_misses"])

        strikes: dict[str, Callable[[TcpProxy], object]] = {
            "away": TcpProxy.cut, "slow": slow, "cut": short, "full": full, "flushed": lambda _: raw.flushall(),
            "flipped": flip,
        }  # fmt: skip
        await p99_s("warm", 20)
        calm_s = await p99_s("calm", 150)
        added_s = {}
        for name, strike in strikes.items():
            async with house.outage(house.to_cache) as proxy:
                strike(proxy)
                added_s[name] = await p99_s(name, 50) - calm_s
            raw.config_set("maxmemory", 64 << 20)
            raw.config_set("maxmemory-policy", "allkeys-lfu")
            await asyncio.sleep(PAUSE_S)  # for which a Redis that failed is left alone
            before = reads()
            await p99_s(f"{name}again", 10)
            assert reads() > before, "nobody came back to the cache"
        raw.close()
        history = await house.history()
        assert proxy.cuts
        assert proxy.falsified
    added = ", ".join(f"{name} {1000 * by_s:+.0f} ms" for name, by_s in added_s.items())
    note = f"P99 of the text {1000 * calm_s:.0f} ms before, then {added}"
    assert verdict.of(len(strikes), history, note=note).keys() == ALL
    assert max(added_s.values()) <= house.settings.cache.timeout_s


@pytest.mark.scenario(5, "plain workers: job Redis killed and restarted")
async def test_5_the_job_redis_is_killed_and_restarted(tmp_path: Path, seed: int, verdict: Verdict) -> None:
    async with House(tmp_path, seed=seed) as house:
        orders = house.orders(names("job", 150), gap_s=0.1)
        for _ in range(6):
            await house.moment(0.5, 2.0)
            await house.restart_redis(house.random.uniform(0.2, 3.0))
        await orders
        await house.ended()
        history = await house.history()
    assert verdict.of(6, history, outages=house.outages).keys() == ALL


@pytest.mark.scenario(5, "plain workers: job Redis slow, silent, connections cut inside a message")
async def test_5_the_way_to_the_job_redis_is_slow_silent_and_cut(tmp_path: Path, seed: int, verdict: Verdict) -> None:
    async with House(tmp_path, seed=seed) as house:
        orders = house.orders(names("job", 150), gap_s=0.1)
        for number in range(9):
            await house.moment(0.2, 1.0)
            async with house.outage(house.to_redis) as proxy:
                match number % 3:
                    case 0:
                        proxy.delay_s = 0.2
                    case 1:
                        proxy.stalled = True
                    case _:
                        proxy.cut_every = 4000
                await house.moment(1.0, 4.0)
        await orders
        await house.ended()
        history = await house.history()
    assert verdict.of(9, history, outages=house.outages).keys() == ALL


@pytest.mark.scenario(6, "S3 away, slow, answers 403, 409, 500, 503, cut inside an upload")
async def test_6_s3_is_away_slow_refuses_and_is_cut(tmp_path: Path, seed: int, verdict: Verdict) -> None:
    async with House(tmp_path, seed=seed) as house:
        orders = house.orders(names("job", 200), gap_s=0.15)
        for number in range(8):
            await house.moment(0.2, 1.0)
            async with house.outage(house.to_s3) as proxy:
                match number % 4:
                    case 0:
                        proxy.cut()
                    case 1:
                        proxy.delay_s = 0.5
                    case 2:
                        proxy.answers, proxy.share = REFUSALS, 0.6
                    case _:
                        proxy.cut_every = 1500
                await house.moment(2.0, 4.0)
        await orders
        await house.ended()
        history = await house.history()
        assert proxy.falsified
        assert proxy.cuts
    assert verdict.of(8, history, outages=house.outages).keys() == ALL


@pytest.mark.scenario(9, "a job that kills its worker")
async def test_9_a_poison_kills_no_more_workers_than_it_has_attempts(
    tmp_path: Path, seed: int, verdict: Verdict
) -> None:
    async with House(tmp_path, seed=seed, workers=3) as house:
        jobs = names("poison", 4) + names("job", 80)
        house.random.shuffle(jobs)
        await house.orders(jobs, gap_s=0.1)
        await house.ended()
        history, deaths = await house.history(), house.fleet.deaths
        poisons = [await house.inside.get(job) for job in names("poison", 4)]
    assert [(job.state, job.attempt, job.error and job.error.code) for job in poisons] == [
        (JobState.FAILED, 3, "worker_lost")
    ] * 4
    ends = verdict.of(deaths, history)
    assert ends == {JobState.SUCCEEDED: 80, JobState.FAILED: 4}
    assert deaths <= 4 * 3


@pytest.mark.parametrize(
    ("kind", "factor", "expected"),
    [
        pytest.param(
            "overflow", 1e5, JobState.SUCCEEDED, marks=pytest.mark.scenario(12, "VAE that overflows in float16")
        ),
        pytest.param("nan", float("nan"), JobState.FAILED, marks=pytest.mark.scenario(12, "VAE that gives NaN")),
    ],
)
async def test_12_what_is_not_a_number_is_no_image(
    tmp_path: Path, seed: int, verdict: Verdict, kind: str, factor: float, expected: JobState
) -> None:
    """One VAE overflows in float16 and is right in float32; the other is wrong in both."""
    model = {"source": str(broken_model(tmp_path / "model", factor)), "name": "broken"}
    precision = {"dtype": "float16"} if kind == "overflow" else {}
    async with House(tmp_path, seed=seed, workers=1, model=model, diffusion=precision) as house:
        await house.orders(names("job", 20), gap_s=0.02)
        await house.ended()
        history = await house.history()
    assert verdict.of(20, history) == {expected: 20}
    if kind == "overflow":
        assert "decoded once more in float32" in logs_of(tmp_path)
    else:
        told = {(entry.error, entry.attempt) for entry in history if isinstance(entry, Answer)}
        assert told == {("not_finite", 1)}


def logs_of(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in folder.glob("worker*.log"))


def broken_model(folder: Path, factor: float) -> Path:
    """The shipped model with the first weights of its decoder multiplied."""
    shutil.copytree(Path("serve/shapes/weights"), folder)
    (place,) = (folder / "vae").glob("*.safetensors")
    weights = load_file(place)
    weights["decoder.conv_in.weight"] = weights["decoder.conv_in.weight"] * factor
    save_file(weights, place)
    return folder


@pytest.mark.scenario(16, "workers' clocks an hour fast and slow, and kill -9")
async def test_16_clocks_that_are_an_hour_wrong_change_nothing(tmp_path: Path, seed: int, verdict: Verdict) -> None:
    house = House(tmp_path, seed=seed, workers=3)
    house.fleet.clock_s = {number: (-3600.0, 3600.0, 0.0)[number % 3] for number in range(1, 100)}
    async with house:
        orders = house.orders(names("job", 100), gap_s=0.05)
        for _ in range(4):
            await house.moment(0.5, 1.5)
            house.kill_a_worker()
        await orders
        await house.ended()
        history, deaths = await house.history(), house.fleet.deaths
    assert verdict.of(deaths, history).keys() == ALL


def test_16_no_lease_and_no_deadline_is_made_of_a_workers_clock() -> None:
    files = [
        *Path("serve/jobs").rglob("*.py"),
        *map(Path, ("serve/worker.py", "serve/patience.py", "serve/storing.py")),
    ]
    wall = re.compile(r"\btime\.time(_ns)?\(|datetime\.(now|utcnow|today)\(")
    # How long the answer to a claim was on its way: told among a job's stages, and nothing is decided by it.
    told = {"serve/jobs/records.py"}
    assert {str(path) for path in files if wall.search(path.read_text(encoding="utf-8"))} == told


@pytest.mark.scenario(17, "worker stopped for longer than its lease, then let go")
async def test_17_a_worker_that_was_cut_off_comes_back_too_late(tmp_path: Path, seed: int, verdict: Verdict) -> None:
    """Each was stopped with a job in hand, and goes on as soon as another has it: so it speaks while the other one
    draws."""
    async with House(tmp_path, seed=seed, workers=3) as house:
        orders = house.orders(names("job", 150), gap_s=0.15, num_inference_steps=40)
        let_go: list[float] = []
        for _ in range(6):
            await house.moment(0.3, 1.0)
            await until(house.holders, 20)
            frozen, claims = house.random.choice(list(house.holders().items()))
            house.fleet.tell(frozen, signal.SIGSTOP)
            with contextlib.suppress(TimeoutError):  # it may have ended the job in that moment
                await until(partial(house.taken, claims), 2 * LEASE_S)
            let_go.append(time.monotonic())
            house.fleet.tell(frozen, signal.SIGCONT)
        await orders
        await house.ended()
        history = await house.history()
    late = spoke_too_late(history)
    came_back = sum(any(0 < word.asked - moment < LEASE_S for word in late) for moment in let_go)
    note = f"{came_back} spoke for a job that another had by then, {len(late)} words in all, each refused"
    assert verdict.of(6, history, note=note, lease_s=LEASE_S).keys() == ALL
    assert came_back >= 3


@pytest.mark.scenario(19, "the same order 100 times at once")
async def test_19_the_same_order_a_hundred_times_at_once(tmp_path: Path, seed: int, verdict: Verdict) -> None:
    async with House(tmp_path, seed=seed) as house:
        for job in names("job", 20):
            heard: list[Awaitable[bool]] = [house.order(job) for _ in range(100)]
            assert all(await asyncio.gather(*heard))
        await house.ended()
        house.told = list(dict.fromkeys(house.told))
        history = await house.history()
    assert verdict.of(20, history) == {JobState.SUCCEEDED: 20}


@pytest.mark.scenario(22, "all of these at once")
async def test_22_everything_at_once(tmp_path: Path, seed: int, verdict: Verdict) -> None:
    """For a while: what hours of load would be."""
    async with House(tmp_path, seed=seed, workers=3) as house:
        orders = house.orders(names("job", 300), gap_s=0.15)
        strikes = 0
        while not orders.done():
            await house.moment(0.5, 1.5)
            strikes += 1
            match house.random.randrange(5):
                case 0:
                    await house.restart_redis(house.random.uniform(0.2, 2.0))
                case 1:
                    async with house.outage(house.to_s3) as proxy:
                        proxy.cut()
                        await house.moment(0.5, 2.0)
                case 2:
                    async with house.outage(house.to_redis) as proxy:
                        proxy.stalled = True
                        await house.moment(0.5, 3.0)
                case _:
                    house.kill_a_worker()
        await house.ended()
        history = await house.history()
    ends = verdict.of(strikes, history, outages=house.outages)
    assert unlucky(history)
    assert ends[JobState.SUCCEEDED] >= 285


def test_the_embedded_redis_of_the_house_is_durable(tmp_path: Path) -> None:
    """What the scenarios above rest on."""
    with EmbeddedRedis(tmp_path, "jobs") as server, redis.Redis.from_url(server.url) as client:
        assert client.config_get("appendfsync") == {"appendfsync": "always"}
