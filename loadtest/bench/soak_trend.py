"""Whether something grows: a straight line through what was seen, and how sure its slope is. No clock, no processes."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

BLOCKS = 10
"""Looks that follow one another are alike: an allocator takes memory in steps and keeps it. Their means over so many
stretches are nearly independent, which the interval of a fitted slope takes for granted."""
LEAST = 4
"""Fewer looks give no interval worth the name."""
CONFIDENCE = 0.95
PER = 1000
"""Images to which a slope refers."""
WIDE = 4
"""Times its limit that a slope may be for all that is known, where it may be 0 as well."""


class Verdict(enum.StrEnum):
    FLAT = "flat"
    GROWS = "grows"
    DOUBT = "in doubt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """The least-squares line through means of `blocks` stretches: `slope` in units for every thousand images, `low` to
    `high` its 95 % interval (Student's t). `first` and `last` are the means of the outermost stretches."""

    slope: float
    low: float
    high: float
    first: float
    last: float
    blocks: int

    def verdict(self, limit: float) -> Verdict:
        """Flat: what was fitted is below `limit` for every thousand images, as what shrinks is; or the interval holds 0
        and ends below `WIDE` times the limit. Growing: all of the interval is above 0. Else nobody can tell: it holds
        0, and much more."""
        if self.slope < limit or (self.low <= 0 and self.high < WIDE * limit):
            return Verdict.FLAT
        return Verdict.GROWS if self.low > 0 else Verdict.DOUBT


def trend(images: Sequence[float], values: Sequence[float]) -> Trend | None:
    """`values` after so many `images`, in the order of looking. None for too few looks, or where no image was drawn
    between them."""
    if len(images) < LEAST or images[-1] <= images[0]:
        return None
    blocks = min(BLOCKS, len(images) // 2) if len(images) >= 2 * LEAST else len(images)
    x = np.array([part.mean() for part in np.array_split(np.asarray(images, dtype=float), blocks)]) / PER
    y = np.array([part.mean() for part in np.array_split(np.asarray(values, dtype=float), blocks)])
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    left = y - y.mean() - slope * (x - x.mean())
    error = math.sqrt(float((left**2).sum()) / (blocks - 2) / spread)
    reach = student(CONFIDENCE, blocks - 2) * error
    return Trend(
        slope=slope, low=slope - reach, high=slope + reach, first=float(y[0]), last=float(y[-1]), blocks=blocks
    )


def second_half(images: Sequence[float]) -> int:
    """The first look at which at least half of the images are drawn."""
    half = images[-1] / 2 if images else 0.0
    return next((index for index, drawn in enumerate(images) if drawn >= half), len(images))


def student(confidence: float, freedom: int) -> float:
    """The t that a fraction `confidence` lies within, on both sides of 0 (Cornish-Fisher's expansion around the normal
    distribution, Abramowitz and Stegun 26.7.5: within 1 % for three degrees of freedom, better for more; exact for one
    and two). ValueError for none."""
    if freedom < 1:
        raise ValueError("an interval without a degree of freedom")
    if freedom == 1:
        return math.tan(math.pi * confidence / 2)
    if freedom == 2:
        return confidence * math.sqrt(2 / (1 - confidence**2))
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))
