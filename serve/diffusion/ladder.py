"""Where a replica stands on the memory ladder, and what is told of memory that ran out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from serve.devices import let_go, out_of_memory
from serve.diffusion.run import Run
from serve.domain.jobs import Relief
from serve.errors import DeviceLost, OperatorError, OutOfMemory, TandemError
from serve.rungs import LADDER, MEANS, Means, Rung
from serve.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")

RUNG_SETTING = "diffusion.rung"
"""What an OperatorError names where a rung does not work here: a library is missing, or knows no such device."""

DESCENT_S = 600.0
"""What a way down may take: weights are read from the folder again, packed, or page-locked, tens of gigabytes of them
with a large model on a slow disk."""


class Ladder:
    """The rung that a replica is on; it only ever goes down.

    It does not climb back by itself: what filled the memory once will do so again, and each try to climb would be paid
    by images in hand, with a reload of weights on top. A replica that starts again begins where its plan says.

    `rung` and `moving_until` may be read on any thread, everything else is the loop thread's.

    Owns: the rung.
    """

    def __init__(
        self,
        rung: Rung = Rung.RESIDENT,
        worst: Rung = Rung.RESIDENT,
        descend: Callable[[Rung], None] = lambda rung: None,
    ) -> None:
        """`worst` is the last rung that may be taken. `descend` takes one, with the images in hand staying as they are;
        where it raises, nothing has changed for them."""
        self.rung = rung
        self._worst = worst
        self._descend = descend
        self._closed: set[Rung] = set()
        self._began_at: float | None = None
        self._ended_at = 0.0

    @property
    def moving_until(self) -> float:
        """When the last way down ended (`time.monotonic`), now while one is under way: nobody stood still before, for
        nothing else could go on. One that takes longer than DESCENT_S hangs: no more of it is excused."""
        began_at, now = self._began_at, time.monotonic()
        return self._ended_at if began_at is None else min(now, began_at + DESCENT_S)

    @property
    def means(self) -> Means:
        return MEANS[self.rung]

    def down(self) -> Rung | None:
        """Take the next rung that can be taken, and say which; None where none is left. Raises DeviceLost.

        One that could not be taken is not tried again.
        """
        began_at = time.monotonic()
        for rung in LADDER[LADDER.index(self.rung) + 1 : LADDER.index(self._worst) + 1]:
            if rung in self._closed:
                continue
            try:
                with self._moving():
                    self._descend(rung)
            except DeviceLost:
                raise
            except Exception as error:  # whatever it is, there are rungs below
                log.warning("rung %s: %s", rung, error, exc_info=None if isinstance(error, TandemError) else error)
                self._closed.add(rung)
                continue
            self.rung = rung
            log.info("on the rung %s after %.1f s", rung, self._ended_at - began_at)
            return rung
        return None

    @contextmanager
    def _moving(self) -> Iterator[None]:
        self._began_at = time.monotonic()
        try:
            yield
        finally:
            self._ended_at = time.monotonic()  # before the other: who reads between the two sees the end
            self._began_at = None


class Shortage:
    """Memory that ran out: counted, told to the runs that it met, and answered by the ladder's next rung.

    `settle` has what works beside the loop end what it is at, and says when it last was at anything
    (`time.monotonic`); `relax` forgets what was learned on the rung that it is given, the one before. `count` may be
    called from any thread, the others are the loop's.
    """

    def __init__(
        self, ladder: Ladder, metrics: Metrics, settle: Callable[[], float], relax: Callable[[Rung], None]
    ) -> None:
        self._ladder = ladder
        self._metrics = metrics
        self._settle = settle
        self._relax = relax
        self._tell_rung()

    def count(self, phase: str) -> None:
        self._metrics.inc("tandem_engine_out_of_memory_total", phase=phase, rung=self._ladder.rung)

    def tell(self, phase: str, measure: str, runs: Iterable[Run]) -> None:
        """The measure is taken, once for each run."""
        for run in dict.fromkeys(runs):
            try:
                run.on_relief(Relief(phase, measure))
            except Exception as error:  # who can't be told is no reason to stop
                log.warning("run %s could not be told of %s", run.id, measure, exc_info=error)

    def make_room(self, phase: str, runs: Iterable[Run], since: float) -> bool:
        """Whether what was begun at `since`, and had no memory in the smallest of its ways, may have it now: what
        worked beside it has ended, or, where nothing did, the replica is on the next rung. Raises DeviceLost."""
        if self._settle() > since:  # so that the next time it comes here, nothing did
            return True
        before, rung = self._ladder.rung, self._ladder.down()
        if rung is None:
            return False
        self._relax(before)
        self._tell_rung()
        self.tell(phase, rung, runs)
        return True

    def _tell_rung(self) -> None:
        self._metrics.set("tandem_engine_rung", LADDER.index(self._ladder.rung))


def first_that_loads(
    best: Rung, worst: Rung, load: Callable[[Rung], T], metrics: Metrics, asked: Rung | None = None
) -> T:
    """What `load` gives on the first rung, from `best` down to `worst`, that works here and on which memory does not
    run out meanwhile. `asked` is the rung that the operator names, if any: that it does not work is for them to know.

    Raises OperatorError naming `diffusion.rung` where one does not work that was asked for, or that was left out
    without any below it to take; else OutOfMemory where memory ran out on all of them.
    """
    unusable: OperatorError | None = None
    for rung in LADDER[LADDER.index(best) : LADDER.index(worst) + 1]:
        try:
            return load(rung)
        except OperatorError as error:
            if error.param != RUNG_SETTING or rung is asked:
                raise
            log.warning("rung %s is left out: %s", rung, error.message)
            unusable = unusable or OperatorError(error.message, error.param)  # without the frames, which hold the model
        except (OutOfMemory, RuntimeError, MemoryError) as error:
            if not isinstance(error, OutOfMemory) and not out_of_memory(error):
                raise
            log.warning("the model does not fit on rung %s: %s", rung, error)
            metrics.inc("tandem_engine_out_of_memory_total", phase="load", rung=rung)
            let_go(error)  # it holds what was loaded
    raise unusable or OutOfMemory(f"the device has no memory for the model, down to the rung {worst}")
