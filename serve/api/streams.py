"""Answers that stay open until a job ends, and how many of them one caller may have."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from serve.errors import Unavailable

_RETRY_AFTER_S = 5.0


class TooManyStreams(Unavailable):
    """The caller has as many event streams and waits open as one may."""

    code = "too_many_streams"


@dataclass(slots=True)
class Streams:
    """Those that this process has open; `most` of one caller. Who is not told apart from others ("") has no bound: it
    would be everybody's.

    Owns: their number by owner.
    """

    most: int
    open: Counter[str] = field(default_factory=Counter)

    @contextlib.contextmanager
    def one(self, owner: str) -> Iterator[None]:
        """Counts as long as it is entered. TooManyStreams."""
        if not owner:
            yield
            return
        if self.open[owner] >= self.most:
            raise TooManyStreams(
                f"{self.most} event streams and waits of this caller are open already (http.max_streams)",
                retry_after_s=_RETRY_AFTER_S,
            )
        self.open[owner] += 1
        try:
            yield
        finally:
            self.open[owner] -= 1
            if not self.open[owner]:
                del self.open[owner]
