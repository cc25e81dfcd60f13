"""What Prometheus pages said during a run, as series over time: gauges as they stood, counters as what they grew by."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from serve.telemetry.declarations import DECLARATIONS

RAY_EXPORT_S = 10.0
"""Ray's processes hand their metrics to the agent of their node about as often: no finer picture of a server exists."""
_FADES = {each.name: each.labels for each in DECLARATIONS if each.fades}

Labels = tuple[tuple[str, str], ...]
Key = tuple[str, Labels]
"""A metric as `serve.telemetry.metrics` declares it, and all of its labels, Ray's too."""
Points = list[tuple[float, float]]
"""(Unix seconds, value); NaN where nothing was to be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One look at one page, at `at` (Unix seconds). `error` says why there are no values."""

    at: float
    url: str
    values: Mapping[Key, float] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """A counter grew by `amount` at some time between two moments (Unix seconds)."""

    since: float
    until: float
    amount: float

    def within(self, since: float, until: float) -> float:
        """The part that falls between two moments, if it grew evenly."""
        if self.until <= self.since:
            return self.amount if since <= self.until < until else 0.0
        overlap = min(self.until, until) - max(self.since, since)
        return self.amount * max(0.0, overlap) / (self.until - self.since)


@dataclass(frozen=True, slots=True)
class Series:
    """All pages of a run in the order of time; those that were read together have the same `at`."""

    pages: tuple[Page, ...] = ()

    def __bool__(self) -> bool:
        """Whether any page was read."""
        return any(not page.error for page in self.pages)

    @property
    def gaps(self) -> tuple[Page, ...]:
        """The pages that did not answer."""
        return tuple(page for page in self.pages if page.error)

    @property
    def refresh_s(self) -> float:
        """How often the counters were seen to change while they did, the median; Ray's usual interval where too few
        changes were seen."""
        return _refresh_s(list(self._changes()))

    def gauge(self, name: str, *by: str) -> dict[tuple[str, ...], Points]:
        """The gauge by the values of the labels `by`, summed over the others. What several processes only hear of is
        the same number told twice: of that, the largest counts."""
        ticks = [(at, self._standing(name, by, pages)) for at, pages in self._ticks()]
        keys = sorted({key for _, standing in ticks for key in standing})
        return {key: [(at, standing.get(key, math.nan)) for at, standing in ticks] for key in keys}

    def growth(self, name: str, *by: str) -> dict[tuple[str, ...], list[Growth]]:
        """What the counter grew by, by the values of the labels `by`, summed over the others.

        A counter is on the page from its first event on: one that is new has grown by all that it says. It grew since
        it was last seen to change, and no longer than `refresh_s` before the look at which it stood as before.
        """
        grown: defaultdict[tuple[str, ...], list[Growth]] = defaultdict(list)
        changes = list(self._changes())
        refresh_s = _refresh_s(changes)
        for one in changes:
            if one.key[0] == name:
                labels = dict(one.key[1])
                values = tuple(labels.get(label, "") for label in by)
                since = max(one.changed_at, one.looked_at - refresh_s)
                grown[values].append(Growth(since=since, until=one.at, amount=one.amount))
        return dict(sorted(grown.items()))

    def total(self, name: str, since: float, until: float, *by: str) -> dict[tuple[str, ...], float]:
        """What the counter grew by between two moments (Unix seconds)."""
        grown = self.growth(name, *by)
        return {key: sum(each.within(since, until) for each in parts) for key, parts in grown.items()}

    def _ticks(self) -> Iterator[tuple[float, list[Page]]]:
        together: dict[float, list[Page]] = {}
        for page in self.pages:
            together.setdefault(page.at, []).append(page)
        yield from together.items()

    @staticmethod
    def _standing(name: str, by: Sequence[str], pages: Sequence[Page]) -> dict[tuple[str, ...], float]:
        """Of a gauge that adds up, a sum without one of its pages would be wrong: then there is none."""
        told_twice = _FADES.get(name)
        if told_twice is None and any(page.error for page in pages):
            return {}
        largest: dict[tuple[str, ...], float] = {}
        summed: defaultdict[tuple[str, ...], float] = defaultdict(float)
        for page in pages:
            for (metric, pairs), value in page.values.items():
                if metric != name:
                    continue
                labels = dict(pairs)
                if told_twice is None:
                    summed[tuple(labels.get(label, "") for label in by)] += value
                else:
                    own = tuple(labels.get(label, "") for label in told_twice)
                    largest[own] = max(value, largest.get(own, -math.inf))
        for own, value in largest.items():
            labels = dict(zip(told_twice or (), own, strict=True))
            summed[tuple(labels.get(label, "") for label in by)] += value
        return dict(summed)

    def _changes(self) -> Iterator[_Change]:
        """A counter that fell began again from 0."""
        last: dict[tuple[str, Key], tuple[float, float]] = {}
        first: dict[str, float] = {}
        looked: dict[str, float] = {}
        for page in self.pages:
            if page.error:
                continue
            new_page = page.url not in first
            first.setdefault(page.url, page.at)
            for key, value in page.values.items():
                if not key[0].endswith("_total"):
                    continue
                at, before = last.get((page.url, key), (first[page.url], value if new_page else 0.0))
                if value != before:
                    grown = value - before if value > before else value
                    yield _Change(key=key, changed_at=at, looked_at=looked[page.url], at=page.at, amount=grown)
                    at = looked[page.url]  # it may have changed at any time since
                last[page.url, key] = (at, value)
            looked[page.url] = page.at


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """A counter stood higher at `at` than at the look before, `looked_at`. It had changed before that, or was first
    looked for, at `changed_at` or later."""

    key: Key
    changed_at: float
    looked_at: float
    at: float
    amount: float


def _refresh_s(changes: Sequence[_Change]) -> float:
    between: list[float] = []
    seen: dict[Key, float] = {}
    for one in changes:
        if one.key in seen and one.at - seen[one.key] <= 3 * RAY_EXPORT_S:
            between.append(one.at - seen[one.key])
        seen[one.key] = one.at
    return median(between) if len(between) >= 3 else RAY_EXPORT_S


def amounts(grown: Sequence[Growth], edges: Sequence[float]) -> list[float]:
    """What grew in each bin between neighbouring edges (Unix seconds)."""
    return [sum(each.within(low, high) for each in grown) for low, high in pairwise(edges)]
