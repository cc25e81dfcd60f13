"""A replica's answer to the benchmark: what its steps take."""

from __future__ import annotations

import asyncio

from serve.diffusion.engine import Engine
from serve.diffusion.profile import Profile
from serve.diffusion.scheduler import LatentShape
from serve.service import Busy


class StepTimes:
    """Synthetic steps between those of the jobs in hand, for one caller at a time, whichever ingress it asked."""

    def __init__(self, engine: Engine, profile: Profile, factor: int) -> None:
        """`factor` is how many pixels a latent has on each side."""
        self._engine = engine
        self._profile = profile
        self._factor = factor
        self._measuring = asyncio.Lock()

    async def measure(self, width: int, height: int, steps: int) -> dict[int, list[float]]:
        """Seconds of each step by batch entries: 1, 2, 4, ... up to the most that step together at this size.

        Raises Busy, OutOfMemory.
        """
        if self._measuring.locked():
            raise Busy("a benchmark is running", retry_after_s=10.0)
        shape = (height // self._factor, width // self._factor)
        most = self._profile.lanes(shape)
        sizes = sorted({1 << power for power in range(most.bit_length())} | {most})
        async with self._measuring:
            return {lanes: await self._measured(shape, lanes, steps) for lanes in sizes}

    async def _measured(self, shape: LatentShape, lanes: int, steps: int) -> list[float]:
        """To its end, even where nobody waits any more: the step loop has it in hand."""
        measuring = asyncio.wrap_future(self._engine.measure(shape, lanes, steps))
        try:
            return await asyncio.shield(measuring)
        except asyncio.CancelledError:
            await asyncio.wait([measuring])
            raise
