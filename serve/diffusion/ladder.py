"""Where a replica stands on the memory ladder, and what is told of memory that ran out."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable
from typing import TypeVar

from serve.devices import out_of_memory
from serve.diffusion.run import Run
from serve.domain import Relief
from serve.errors import DeviceLost, OutOfMemory, TandemError
from serve.rungs import LADDER, MEANS, Means, Rung
from serve.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")


class Ladder:
    """The rung that a replica is on; it only ever goes down.

    It does not climb back by itself: what filled the memory once will do so again, and each try to climb would be paid
    by images in hand, with a reload of weights on top. A replica that starts again begins where its plan says.

    `rung` may be read on any thread, everything else is the loop thread's.

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

    @property
    def means(self) -> Means:
        return MEANS[self.rung]

    def down(self) -> Rung | None:
        """Take the next rung that can be taken, and say which; None where none is left. Raises DeviceLost.

        One that could not be taken is not tried again.
        """
        for rung in LADDER[LADDER.index(self.rung) + 1 : LADDER.index(self._worst) + 1]:
            if rung in self._closed:
                continue
            try:
                self._descend(rung)
            except DeviceLost:
                raise
            except Exception as error:  # whatever it is, there are rungs below
                log.warning("rung %s: %s", rung, error, exc_info=None if isinstance(error, TandemError) else error)
                self._closed.add(rung)
                continue
            self.rung = rung
            return rung
        return None


class Shortage:
    """Memory that ran out: counted, told to the runs that it met, and answered by the ladder's next rung.

    `prepare` has what works beside the loop end what it is at, before the ladder is descended; `relax` forgets what
    was learned of the memory on the rung before. `count` may be called from any thread, the others are the loop's.
    """

    def __init__(
        self, ladder: Ladder, metrics: Metrics, prepare: Callable[[], None], relax: Callable[[], None]
    ) -> None:
        self._ladder = ladder
        self._metrics = metrics
        self._prepare = prepare
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

    def descend(self, phase: str, runs: Iterable[Run]) -> bool:
        """Whether there was a rung left; the replica is on it now. Raises DeviceLost."""
        self._prepare()
        rung = self._ladder.down()
        if rung is None:
            return False
        self._relax()
        self._tell_rung()
        self.tell(phase, rung, runs)
        return True

    def _tell_rung(self) -> None:
        self._metrics.set("tandem_engine_rung", LADDER.index(self._ladder.rung))


def first_that_loads(best: Rung, worst: Rung, load: Callable[[Rung], T], metrics: Metrics) -> T:
    """What `load` gives on the first rung, from `best` down to `worst`, on which memory does not run out meanwhile.

    Raises OutOfMemory where it does on all of them.
    """
    for rung in LADDER[LADDER.index(best) : LADDER.index(worst) + 1]:
        try:
            return load(rung)
        except (OutOfMemory, RuntimeError, MemoryError) as error:
            if not isinstance(error, OutOfMemory) and not out_of_memory(error):
                raise
            log.warning("the model does not fit on rung %s: %s", rung, error)
            metrics.inc("tandem_engine_out_of_memory_total", phase="load", rung=rung)
            traceback.clear_frames(error.__traceback__)  # they hold what was loaded
    raise OutOfMemory(f"the device has no memory for the model, down to the rung {worst}")
