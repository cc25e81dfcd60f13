"""What the job store says of the work and its workers, asked again and again, beside whoever must not wait for it."""

from __future__ import annotations

import json
import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from serve.jobs import scripts
from serve.scaling.demand import Band, Place, carried, desired
from serve.scaling.rates import Rates

log = logging.getLogger(__name__)

EVERY_S, SELDOM_S = 1.0, 5.0
"""Between two looks: the longer one takes, the longer, up to the second of the two, so that a store with much in it is
not kept busy by them for more than a SHARE of its time."""
SHARE = 0.02
STALE_S = 10.0
"""What was seen so long ago is nothing to act on."""
FORGOTTEN_S = 30.0
"""A watch for which nobody has asked ends; the next question begins it again."""
PACES_S = 10.0
"""Between two looks at what the workers report."""
_TIMEOUT_S = 5.0
_SETTINGS = (1, 1, 1)
"""With which every script begins; those that end no job read none of them."""


@dataclass(frozen=True, slots=True)
class StoreAt:
    """Where the job Redis is: its URL, or the environment's variable that has it, so that no copy of this holds a
    secret."""

    url: str = ""
    variable: str = ""

    def resolve(self) -> str:
        """Raises KeyError."""
        return os.environ[self.variable] if self.variable else self.url


@dataclass(frozen=True, slots=True)
class Seen:
    """By placement: replicas for the work of that moment, and for what arrives. `at` is when (`time.monotonic`)."""

    at: float
    wanted: Mapping[str, int]
    carried: Mapping[str, int]


class Watch:
    """One look a second on a thread of its own, for as long as somebody asks. `doubt` says why nothing is seen.

    Owns: that thread and its connection, the averages of what arrives, and what was seen last.
    """

    def __init__(self, store: StoreAt, places: Sequence[Place], clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._places = tuple(places)
        self._clock = clock
        self._bounds = {
            model: sorted({place.max_pixels for place in places if place.model == model})
            for model in dict.fromkeys(place.model for place in places)
        }
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._asked_at = 0.0
        self._seen: Seen | None = None
        self.doubt = ""

    def seen(self) -> Seen | None:
        """At once. None while nothing is known: nobody has looked yet, or the store is away."""
        self._asked_at = self._clock()
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="watch-job-store", daemon=True)
                self._thread.start()
        seen = self._seen
        return seen if seen is not None and self._clock() - seen.at < STALE_S else None

    def _run(self) -> None:
        look: Look | None = None
        while self._clock() - self._asked_at < FORGOTTEN_S:
            began, pause_s = self._clock(), EVERY_S
            try:
                look = look or Look(self._store.resolve(), self._bounds)
                bands, paces = look(began)
                places = [replace(place, pace=paces.get(place.name, 1.0)) for place in self._places]
                self._seen = Seen(began, desired(places, bands), carried(places, bands))
                pause_s = min(max(EVERY_S, (self._clock() - began) / SHARE), SELDOM_S)
                self._tell("")
            except KeyError as error:
                self._tell(f"environment {error.args[0]}: it is missing where Serve's controller runs")
            except (RedisError, OSError, ValueError) as error:
                self._tell(f"the job store does not answer: {type(error).__name__}")
            time.sleep(pause_s)
        if look is not None:
            look.close()

    def _tell(self, doubt: str) -> None:
        """Once, not every second."""
        if doubt and doubt != self.doubt:
            log.warning("%s; the placements keep the replicas that they have", doubt)
        self.doubt = doubt


class Look:
    """One look at the job store, again and again. Raises RedisError, OSError.

    Owns: the connection, and what it saw before.
    """

    def __init__(self, url: str, bounds: Mapping[str, Sequence[int]]) -> None:
        self._redis = Redis.from_url(
            url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, protocol=2, decode_responses=True
        )
        sources = scripts.sources()
        self._bands, self._report = (self._redis.register_script(sources[name]) for name in ("bands", "report"))
        self._bounds = bounds
        self._asked: list[str | int] = []
        for model, its in bounds.items():
            self._asked += [model, len(its), *its]
        self._last = -1
        self._rates = Rates()
        self._paces: Mapping[str, float] = {}
        self._paces_at = float("-inf")

    def __call__(self, now: float) -> tuple[Mapping[str, Sequence[Band]], Mapping[str, float]]:
        """Bands by model, paces by placement."""
        self._last, found = self._bands(args=(*_SETTINGS, self._last, *self._asked))[1]
        self._rates.add(now, {(model, n): arrived for model, n, mark, *_, arrived in found if not mark})
        if now - self._paces_at >= PACES_S:
            self._paces, self._paces_at = paces_of(self._report(args=(*_SETTINGS, 0))[1][0]), now
        return {model: list(self._of(model, found)) for model in self._bounds}, self._paces

    def _of(self, model: str, found: Sequence[Sequence[Any]]) -> Sequence[Band]:
        its = self._bounds[model]
        edges = list(zip([0, *its], its, strict=False))
        told = {(n, mark): rest for of, n, mark, *rest in found if of == model}
        bands = []
        for n, mark in sorted({(n, 0) for n in range(1, len(edges) + 1)} | told.keys()):
            queued, held, jobs, _ = told.get((n, mark), (0, 0, 0, 0))
            rate = 0.0 if mark else self._rates.of((model, n))
            above, upto = edges[n - 1]
            bands.append(Band(above, upto, float(queued), float(held), jobs, rate, mark))
        return bands

    def close(self) -> None:
        self._redis.close()


def paces_of(reports: Sequence[str]) -> dict[str, float]:
    """By placement, on average."""
    told: dict[str, list[float]] = {}
    for report in map(json.loads, reports):
        told.setdefault(report["placement"], []).append(float(report.get("pace", 1.0)))
    return {placement: statistics.fmean(paces) for placement, paces in told.items()}


_WATCHES: dict[tuple[StoreAt, tuple[Place, ...]], Watch] = {}
_OPENING = threading.Lock()


def watch(store: StoreAt, places: Sequence[Place]) -> Watch:
    """The one of this process: all placements of an application look through the same."""
    with _OPENING:
        return _WATCHES.setdefault((store, tuple(places)), Watch(store, places))
