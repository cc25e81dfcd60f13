"""One benchmark at a time on a replica, whoever asks."""

import asyncio
from concurrent.futures import Future
from typing import cast

import pytest

from deployments.step_times import StepTimes
from serve.diffusion.engine import Engine
from serve.diffusion.profile import Profile
from serve.diffusion.scheduler import LatentShape
from serve.service import Busy


class Loop:
    """Stands for the engine: measurements end when the test says so."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[tuple[LatentShape, int, Future[list[float]]]] = asyncio.Queue()

    def measure(self, shape: LatentShape, lanes: int, steps: int) -> Future[list[float]]:
        future: Future[list[float]] = Future()
        future.set_running_or_notify_cancel()
        self.asked.put_nowait((shape, lanes, future))
        return future


def test_who_hangs_up_makes_no_room_for_another_before_the_steps_in_hand_are_made() -> None:
    async def story() -> None:
        loop = Loop()
        times = StepTimes(cast(Engine, loop), Profile(1), 8)
        left = asyncio.create_task(times.measure(64, 128, 5))
        _, _, in_hand = await loop.asked.get()
        left.cancel()
        with pytest.raises(Busy):
            await asyncio.create_task(times.measure(64, 128, 5))
        in_hand.set_result([0.1] * 5)
        with pytest.raises(asyncio.CancelledError):
            await left
        again = asyncio.create_task(times.measure(64, 128, 5))
        for wanted in (1, 2):
            shape, lanes, future = await loop.asked.get()
            assert (shape, lanes) == ((16, 8), wanted)
            future.set_result([0.1 * lanes])
        assert await again == {1: [0.1], 2: [0.2]}
        assert loop.asked.empty()

    asyncio.run(story())
