"""What was wanted over time -> a decision that does not flap."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable


class Steady:
    """Grows at once; shrinks to the most that was wanted within the last `idle_s`, so that a pause between two bursts
    doesn't cost a start. Replicas that are new count as wanted: they have had no time to do or report anything, and who
    has ordered them orders no others for the same work. `clock` is in seconds.

    Owns: what was wanted lately.
    """

    def __init__(self, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._idle_s = idle_s
        self._clock = clock
        self._current = 0
        self._lately: deque[tuple[float, int]] = deque()

    def __call__(self, wanted: int, current: int, carried: int = 0) -> int:
        """`current` replicas there are, those that start included; `carried` are what the arriving work takes, below
        which nobody shrinks who has something to do."""
        if 0 < wanted < current:
            wanted = max(wanted, min(current, carried))
        now = self._clock()
        counts = max(wanted, current) if current > self._current else wanted
        self._current = current
        while self._lately and self._lately[-1][1] <= counts:
            self._lately.pop()  # outlived by a larger one: what stays falls, and the first is the most
        self._lately.append((now, counts))
        while self._lately[0][0] < now - self._idle_s:
            self._lately.popleft()
        return wanted if wanted >= current else min(current, self._lately[0][1])
