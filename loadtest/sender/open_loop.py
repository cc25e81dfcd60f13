"""The clock of a load test: requests are sent when they are due, whatever is under way."""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gevent
from gevent.pool import Group
from locust.env import Environment

from loadtest.driver import Progress
from loadtest.samples import Arrival, Outcome, Sample
from loadtest.sender.users import DIALECTS, Told, Visit
from loadtest.sender.wire import Broken, Wire

_LATEST = 200
"""Answers whose median a progress line tells."""


class Run:
    """One trace on its way. Owns: the clock, the requests under way, what is told of them so far.

    Every request that ended is given to `on_sample` and told to Locust, with its response time from when it was due.
    """

    def __init__(
        self, wire: Wire, give_up_s: float, environment: Environment, on_sample: Callable[[Sample], None]
    ) -> None:
        self._wire = wire
        self._give_up_s = give_up_s
        self._environment = environment
        self._on_sample = on_sample
        self._under_way = Group()
        self._sent = 0
        self._outcomes: Counter[Outcome] = Counter()
        self._latest: deque[float] = deque(maxlen=_LATEST)
        self.started_at = time.time()
        self._zero = time.perf_counter()

    def now(self) -> float:
        """Seconds after the start."""
        return time.perf_counter() - self._zero

    def open_loop(self, arrivals: Sequence[Arrival]) -> None:
        """Returns when everything that was sent has ended."""
        try:
            for arrival in arrivals:
                if (early := arrival.due_s - self.now()) > 0:
                    gevent.sleep(early)
                self._under_way.spawn(self._request, arrival, arrival.due_s)
            self._under_way.join()
        finally:
            self._under_way.kill()

    def closed_loop(self, arrivals: Sequence[Arrival], users: int, until_s: float | None) -> None:
        """Each of the users sends the next arrival when the one before has ended, after a refusal when the server said
        that it may; none after `until_s`."""
        rest = iter(arrivals)
        try:
            for _ in range(users):
                self._under_way.spawn(self._user, rest, until_s)
            self._under_way.join()
        finally:
            self._under_way.kill()

    def progress(self) -> Progress:
        ended = sum(self._outcomes.values())
        failed = ended - sum(self._outcomes[kind] for kind in (Outcome.DONE, Outcome.REFUSED, Outcome.LEFT))
        return Progress(
            started_at=self.started_at,
            elapsed_s=self.now(),
            sent=self._sent,
            done=self._outcomes[Outcome.DONE],
            refused=self._outcomes[Outcome.REFUSED],
            failed=failed,
            under_way=self._sent - ended,
            p50_s=statistics.median(self._latest) if self._latest else None,
        )

    def _user(self, rest: Iterator[Arrival], until_s: float | None) -> None:
        for arrival in rest:
            if until_s is not None and self.now() >= until_s:
                return
            if again_s := self._request(arrival, self.now()):
                gevent.sleep(again_s if until_s is None else min(again_s, max(0.0, until_s - self.now())))

    def _request(self, arrival: Arrival, due_s: float) -> float:
        """How long the client must wait before it comes again; 0 but after a refusal."""
        sent_s = self.now()
        self._sent += 1
        visit = Visit(self._wire, arrival.body)
        outcome, detail, again_s = self._visit(arrival, visit, due_s, sent_s)
        ended_s = self.now()
        if outcome in (Outcome.DONE, Outcome.FAILED):
            visit.look_back()
        sample = Sample(
            index=arrival.index,
            dialect=arrival.dialect,
            due_s=due_s,
            sent_s=sent_s,
            ended_s=ended_s,
            outcome=outcome,
            status=visit.status,
            detail=detail,
            bytes=visit.bytes,
            job=visit.job,
            hangs_up=arrival.hang_up_s is not None,
        )
        self._outcomes[outcome] += 1
        if outcome is Outcome.DONE and not sample.hangs_up:
            self._latest.append(sample.latency_s)
        self._on_sample(sample)
        self._tell(sample)
        return again_s

    def _visit(self, arrival: Arrival, visit: Visit, due_s: float, sent_s: float) -> tuple[Outcome, str, float]:
        """What became of it, why, and when the client may come again. A planned hang-up counts from the sending: who
        has not come can't leave."""
        patience = self._give_up_s - (sent_s - due_s)
        leaves = arrival.hang_up_s is not None and arrival.hang_up_s < patience
        seconds = arrival.hang_up_s if leaves else patience
        limit = gevent.Timeout(max(seconds or 0.0, 0.001))
        limit.start()
        try:
            DIALECTS[arrival.dialect](visit)
        except gevent.Timeout as over:
            if over is not limit:
                raise
            return (Outcome.LEFT, "", 0.0) if leaves else (Outcome.LATE, f"given up after {self._give_up_s:g} s", 0.0)
        except Told as answer:
            return answer.outcome, answer.detail, answer.again_s
        except Broken as error:
            return Outcome.BROKEN, f"{type(error).__name__}: {error}"[:100], 0.0
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return Outcome.FAILED, f"not an answer of this dialect ({type(error).__name__}: {error})"[:100], 0.0
        finally:
            limit.close()
        return Outcome.DONE, "", 0.0

    def _tell(self, sample: Sample) -> None:
        trouble: Any = None
        if sample.outcome not in (Outcome.DONE, Outcome.LEFT):
            trouble = f"{sample.outcome} {sample.status} {sample.detail}".strip()
        self._environment.events.request.fire(
            request_type="order",
            name=sample.dialect,
            response_time=1000.0 * sample.latency_s,
            response_length=sample.bytes,
            exception=trouble,
            context={"index": sample.index},
        )
