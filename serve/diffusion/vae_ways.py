"""The ways in which an image can be encoded or decoded, the fastest first, the one that takes least memory last."""

from __future__ import annotations

from dataclasses import dataclass

from serve.domain.orders import ImageRequest

SIDES = (512, 256)
"""Of the tiles of what ran out of memory as it was, in pixels."""


@dataclass(frozen=True, slots=True)
class Way:
    """`beside` the steps or between two; in tiles of so many pixels a side, None for the VAE's own."""

    beside: bool
    side: int | None = None

    @property
    def name(self) -> str:
        """As a measure against lack of memory."""
        return "between_steps" if self.side is None else f"tiles_{self.side}"


class Ways:
    """Those of one kind of work, `encode` or `decode`. An image of as many pixels as one that ran out of memory begins
    where that one came through, so that a size runs out once.

    Of the loop's thread. Owns: the fewest pixels for which each way ran out.
    """

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self._too_many: dict[Way, int] = {}

    def of(self, request: ImageRequest, tile: int, *, beside: bool) -> tuple[Way, ...]:
        """What may be tried for an image of the request, at least one way. Tiles that are no smaller than the image, or
        than the VAE's own, change nothing."""
        longest = max(request.width, request.height)
        sides = [side for side in SIDES if side < min(tile, longest)]
        ways = [*([Way(True)] if beside else []), Way(False), *(Way(False, side) for side in sides)]
        known = [way for way in ways if request.pixels < self._too_many.get(way, request.pixels + 1)]
        return tuple(known or ways[-1:])

    def ran_out(self, way: Way, request: ImageRequest) -> None:
        self._too_many[way] = min(request.pixels, self._too_many.get(way, request.pixels))

    def relax(self) -> None:
        self._too_many.clear()
