"""Where the time of one attempt at a job goes, told by whoever makes it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable

from serve.diffusion.run import Spent
from serve.domain.jobs import Timings
from serve.domain.text import Tier
from serve.jobs.store import Claim

_SLOWNESS = list(Tier)
"""From the fastest to the slowest."""


class Account:
    """One mark after another on one monotonic clock: each stage begins where the one before it has ended, so that what
    the event loop keeps an attempt waiting for falls into the stage that comes next, and nothing between them.

    Owns: the stages that the attempt has behind it.
    """

    def __init__(self, claim: Claim) -> None:
        self._at = claim.answered_at
        self._own = Timings(claim_s=claim.claim_s)
        self._before = (claim.retried_s, claim.queued_s)

    @property
    def timings(self) -> Timings:
        """What the replica knows of them. What came before the claim is the job store's to say."""
        return self._own

    @property
    def so_far(self) -> Timings:
        """The same, with what came before, as the claim told it."""
        retried_s, queued_s = self._before
        return dataclasses.replace(self._own, retried_s=retried_s, queued_s=queued_s)

    @property
    def since_s(self) -> float:
        """Seconds since the last of them ended."""
        return time.monotonic() - self._at

    def begin(self) -> None:
        """The replica begins."""
        self._add(claim_s=(self._own.claim_s or 0.0) + self._lap(time.monotonic()))

    def found(self) -> None:
        """An earlier attempt had stored the images."""
        self._add(put_s=self._lap(time.monotonic()))

    def composed(self, tiers: Iterable[Tier]) -> float:
        """The text is there, from these tiers; how many seconds it took."""
        text_s = self._lap(time.monotonic())
        self._add(text_s=text_s, text_from=max(tiers, key=_SLOWNESS.index, default=None))
        return text_s

    def drawn(self, spent: Spent, *, fetched: bool) -> None:
        """The engine has drawn the images. `fetched`: it starts from images that were fetched before."""
        way_s = self._lap(spent.began_at)
        if fetched:
            self._add(input_s=way_s, source_s=spent.source_s)
        else:
            self._add(text_s=(self._own.text_s or 0.0) + way_s)
        self._add(
            batch_s=spent.batch_s,
            steps_s=spent.steps_s,
            decode_wait_s=spent.decode_wait_s,
            decode_s=spent.decode_s,
            batch_images=spent.batch_images,
        )
        self._at = spent.ended_at

    def compressed(self) -> None:
        """The images are files."""
        self._add(compress_s=self._lap(time.monotonic()))

    def put(self) -> None:
        """The files and their manifest are in the result store."""
        self._add(put_s=self._lap(time.monotonic()))

    def _add(self, **stages: float | Tier | None) -> None:
        self._own = dataclasses.replace(self._own, **stages)  # type: ignore[arg-type]

    def _lap(self, now: float) -> float:
        took_s, self._at = now - self._at, now
        return took_s
