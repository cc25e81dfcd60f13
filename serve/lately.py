"""What has been seen in the last seconds."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Lately(Generic[K]):
    """Knows what was noted in the last `within_s` seconds, and at most the latest `most` of it.

    Owns: those keys, the latest last.
    """

    def __init__(self, within_s: float, most: int = 100_000) -> None:
        self.within_s = within_s
        self._most = most
        self._noted: OrderedDict[K, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._noted)

    def __contains__(self, key: K) -> bool:
        noted_at = self._noted.get(key)
        return noted_at is not None and time.monotonic() - noted_at <= self.within_s

    def note(self, key: K) -> None:
        now = time.monotonic()
        self._noted[key] = now
        self._noted.move_to_end(key)
        while len(self._noted) > self._most or now - next(iter(self._noted.values())) > self.within_s:
            self._noted.popitem(last=False)

    def clear(self) -> None:
        self._noted.clear()
