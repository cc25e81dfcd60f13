"""What an order costs the job store does not grow without end with the jobs that workers hold."""

import random

import pytest
import redis.asyncio
from support.jobs import ANY, MODEL, Bench, a_request, on

from serve.jobs import scripts
from serve.jobs.store import Terms
from serve.simulate.redis_use import MOST_HELD


def test_of_very_many_jobs_in_hand_a_part_is_looked_at(redis_url: str) -> None:
    """An order reads no more records with a thousand jobs in hand than with some hundred, and is told the same."""

    async def story(bench: Bench) -> None:
        reads: dict[int, int] = {}
        told: dict[int, tuple[int, float]] = {}
        costs = random.Random(1)
        held = 0
        async with redis.asyncio.Redis.from_url(redis_url) as client:
            for size in (256, 1024):
                while held < size:
                    terms = Terms(cost_ms=1000 + costs.randrange(1000), replicas=10_000)
                    await bench.store.submit(f"job-{held}", a_request(), terms=terms)
                    assert await bench.store.claim("worker", ANY) is not None
                    held += 1
                before = (await client.info("commandstats"))["cmdstat_hmget"]["calls"]
                backlog = await bench.store.backlog(MODEL)
                reads[size] = (await client.info("commandstats"))["cmdstat_hmget"]["calls"] - before
                told[size] = backlog.held_ms, backlog.held_ms / size
        assert reads[1024] <= reads[256] <= 256 + 2
        assert told[1024][1] == pytest.approx(told[256][1], rel=0.05)
        assert told[256][1] == pytest.approx(1500, rel=0.05)

    on(redis_url, story, max_queued=10_000)


def test_the_simulation_counts_as_many_as_the_script_reads() -> None:
    assert f"local MOST_HELD = {MOST_HELD}\n" in (scripts.FOLDER / "common.lua").read_text()
