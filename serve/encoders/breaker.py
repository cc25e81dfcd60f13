"""A circuit breaker: a backend that fails is left alone for a while, then tried by one caller."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable


class BreakerState(enum.StrEnum):
    """closed: all calls pass. open: none. half-open: one call, the probe, is under way and decides."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """Ask `enter` before a call, and report how it went with the ticket that it gave. Belongs to one event loop.

    The first failure opens it: for a cache, the one failure that was paid for is reason enough to go without. A ticket
    is worth nothing once the state has changed: a slow call from before can neither close nor open what came after it.

    Owns: the state, and when it may be tried again.
    """

    def __init__(self, pause_s: float, on_change: Callable[[BreakerState], None]) -> None:
        """`on_change` is called with each new state."""
        self.state = BreakerState.CLOSED
        self._pause_s = pause_s
        self._on_change = on_change
        self._tickets = 0
        self._rests_until = 0.0

    @property
    def resting(self) -> bool:
        """No call passes yet. A rest ends by itself: afterwards nobody knows, until somebody calls."""
        return self.state is not BreakerState.CLOSED and time.monotonic() < self._rests_until

    def enter(self) -> int | None:
        """A ticket, or None where the call is not to be made."""
        if self.state is BreakerState.OPEN and time.monotonic() >= self._rests_until:
            self._turn(BreakerState.HALF_OPEN)
            return self._tickets
        return self._tickets if self.state is BreakerState.CLOSED else None

    def succeeded(self, ticket: int) -> None:
        if ticket == self._tickets and self.state is BreakerState.HALF_OPEN:
            self._turn(BreakerState.CLOSED)

    def failed(self, ticket: int) -> bool:
        """True for the one caller whose failure opened the breaker."""
        if ticket != self._tickets:
            return False
        self._rests_until = time.monotonic() + self._pause_s
        self._turn(BreakerState.OPEN)
        return True

    def trip(self) -> bool:
        """Open it on somebody else's word, or rest longer: who says so has just tried. True where it was closed."""
        if self.state is BreakerState.OPEN:
            self._rests_until = time.monotonic() + self._pause_s
        return self.state is BreakerState.CLOSED and self.failed(self._tickets)

    def gave_up(self, ticket: int) -> None:
        """The caller was cancelled and learned nothing: where it was the probe, the next caller is."""
        if ticket == self._tickets and self.state is BreakerState.HALF_OPEN:
            self._turn(BreakerState.OPEN)

    def _turn(self, state: BreakerState) -> None:
        self.state = state
        self._tickets += 1
        self._on_change(state)
