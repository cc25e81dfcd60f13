"""A worker in which nothing goes on says so, and one that only waits for others does not."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
from support.house import GatedRunner, House, open_house, until

from serve.diffusion.engine import Work
from serve.diffusion.ladder import Ladder
from serve.diffusion.runner import Latents, Runner
from serve.diffusion.scheduler import Row
from serve.domain.jobs import JobState
from serve.errors import OutOfMemory
from serve.rungs import Rung

pytestmark = pytest.mark.anyio

STALL_S = 0.05
HANGS = "the step loop makes no step, or leaves a job without any"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def house(redis_url: str, tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(redis_url, tmp_path, lease_s=600.0) as house:
        yield house


class HungVae(GatedRunner):
    """Decodes nothing until its gate is opened."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner, free=1 << 30)

    def decode(self, latents: Latents, side: int | None = None) -> object:
        self.reached.set()
        assert self.gate.wait(60)
        return super().decode(latents, side)


@pytest.mark.parametrize("kind", [GatedRunner, HungVae])
async def test_a_step_or_a_decoding_that_hangs_shows(house: House, kind: type[GatedRunner]) -> None:
    runner = kind(house.runner)
    async with house.worker(runner=runner, stall_s=STALL_S) as worker:
        assert worker.ailment is None
        await house.submit("a")
        assert await asyncio.to_thread(runner.reached.wait, 60)
        await until(lambda: worker.hangs)
        assert worker.ailment == HANGS
        runner.gate.set()
        assert (await house.ended("a")).state is JobState.SUCCEEDED
        await until(lambda: not worker.rows)
        assert worker.ailment is None
        await asyncio.sleep(2 * STALL_S)  # idle is not ill, however long
        assert worker.ailment is None


class Forgetful(Runner):
    """Never says which images of `forgotten` there are to step."""

    def rows(self, work: Work) -> Sequence[Row]:
        return [] if work.request.prompt == "forgotten" else super().rows(work)


async def test_a_job_that_the_loop_makes_no_step_of_shows(house: House) -> None:
    """Although the loop steps others all the while."""
    stall_s = 0.5
    async with house.worker(runner=Forgetful(house.runner.family), stall_s=stall_s) as worker:
        await house.submit("steps", num_inference_steps=1000)
        await house.submit("a", prompt="forgotten")
        await until(lambda: worker.ailment == HANGS)
        assert worker._engine.still_s < stall_s
        assert (await house.jobs.get("a")).state is JobState.RUNNING
        await worker.abandon()
        assert [(await house.jobs.get(job_id)).state for job_id in ("a", "steps")] == [JobState.QUEUED] * 2


class Short(Runner):
    """Has no memory for the first step. `hangs` is asked before the next ones."""

    def __init__(self, runner: Runner, hangs: Callable[[], bool]) -> None:
        super().__init__(runner.family)
        self._hangs = hangs
        self.told: list[bool] = []

    def step(self, rows: Sequence[Row], most: int | None = None) -> dict[Row, Exception]:
        self.told.append(self._hangs())
        if len(self.told) == 1:
            raise OutOfMemory("the device ran out of memory")
        return super().step(rows, most)


async def test_a_way_down_the_memory_ladder_is_no_ailment(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while weights are moved nor right after it, when no job has made a step for as long."""
    stall_s, ahead_s, real, moving = 5.0, [0.0], time.monotonic, list[bool]()
    monkeypatch.setattr(time, "monotonic", lambda: real() + sum(ahead_s))

    def descend(rung: Rung) -> None:
        ahead_s.append(4 * stall_s)
        moving.append(worker.hangs)

    runner = Short(house.runner, lambda: worker.hangs)
    ladder = Ladder(Rung.RESIDENT, Rung.VAE_SLICING, descend)
    async with house.worker(runner=runner, stall_s=stall_s, ladder=ladder) as worker:
        await house.submit("a", num_inference_steps=2, guidance_scale=1.0)
        assert (await house.ended("a")).state is JobState.SUCCEEDED
        assert worker._engine.rung is Rung.VAE_SLICING
    assert (moving, runner.told) == ([False], [False] * 3)


async def test_waiting_for_text_or_for_the_result_store_is_no_ailment(house: House) -> None:
    blocked = house.folder / "images"
    blocked.write_text("a file where the folder should be")
    async with house.worker(stall_s=STALL_S) as worker:
        await house.submit("stored")
        await house.reaches("stored", lambda job: job.state is JobState.STORING)
        house.encoder_away = True
        await house.submit("read", prompt="words that nobody knows yet")
        await house.reaches("read", lambda job: job.state is JobState.ENCODING)
        await asyncio.sleep(2 * STALL_S)
        assert worker.ailment is None
        house.encoder_away = False
        blocked.unlink()
        assert {(await house.ended(job_id)).state for job_id in ("stored", "read")} == {JobState.SUCCEEDED}


async def test_what_is_known_to_be_slow_may_take_its_time(house: House) -> None:
    """The profile knows a step of 8 s at this size: five times that are allowed, whatever the setting says."""
    runner = GatedRunner(house.runner, free=1)
    async with house.worker(runner=runner, stall_s=STALL_S) as worker:
        worker._engine._profile.learn((64, 64), 2, 8000.0)
        await house.submit("a", width=512, height=512)
        assert await asyncio.to_thread(runner.reached.wait, 60)
        await asyncio.sleep(2 * STALL_S)
        assert worker.ailment is None
        runner.gate.set()
        await house.jobs.cancel("a")
