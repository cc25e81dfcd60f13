"""How much of what is drawn a replica keeps in memory while the result store is away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from serve.telemetry.metrics import Metrics


class Spool:
    """Bounds the bytes of finished, encoded images that wait for the store while the replica draws on.

    It holds no image itself: whoever has them asks for room, and where there is none keeps the job's rows counted, so
    that the replica claims less and in the end nothing. Used in one event loop; nothing here waits.

    Owns: the count.
    """

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._held = 0
        metrics.set("tandem_spool_capacity_bytes", max_bytes)
        self._add(0)

    @property
    def held(self) -> int:
        """Bytes in it."""
        return self._held

    def fits(self, nbytes: int) -> bool:
        return self._held + nbytes <= self._max_bytes

    @contextlib.contextmanager
    def room(self, nbytes: int) -> Iterator[bool]:
        """Whether so many bytes fit; if so they are taken until the block ends."""
        fits = self.fits(nbytes)
        taken = nbytes if fits else 0
        self._add(taken)
        try:
            yield fits
        finally:
            self._add(-taken)

    def check_integrity(self) -> None:
        """For tests. Raises AssertionError."""
        assert 0 <= self._held <= self._max_bytes, f"{self._held} bytes of {self._max_bytes}"

    def _add(self, nbytes: int) -> None:
        self._held += nbytes
        self._metrics.set("tandem_spool_bytes", self._held)
