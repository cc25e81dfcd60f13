"""The self-test's steps over made-up rows, each made between two steps of the users' work."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from serve.diffusion.run import public
from serve.diffusion.runner import Runner
from serve.diffusion.scheduler import LatentShape
from serve.errors import DeviceLost, TandemError


@dataclass(slots=True)
class Measurement:
    """Synthetic steps that were asked for, and the seconds of those that were made."""

    shape: LatentShape
    lanes: int
    steps: int
    future: Future[list[float]]
    seconds: list[float] = field(default_factory=list)


class Measurements:
    """Those that were asked for, one after the other. Of the loop's thread."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._waiting: deque[Measurement] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, measurement: Measurement) -> None:
        self._waiting.append(measurement)

    def step(self) -> None:
        """One forward of the first of them, if there is one. Raises DeviceLost; what else fails is that one's."""
        if not self._waiting:
            return
        first = self._waiting[0]
        try:
            first.seconds.append(self._runner.measure(first.shape, first.lanes))
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001  a measurement that fails is told, the loop goes on
            self._waiting.popleft().future.set_exception(public(error))
            return
        if len(first.seconds) >= first.steps:
            self._waiting.popleft().future.set_result(first.seconds)

    def end(self, error: TandemError) -> None:
        """All of them fail."""
        while self._waiting:
            self._waiting.popleft().future.set_exception(error)
