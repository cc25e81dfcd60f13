"""The thread beside the step loop: whatever the VAE does, it never makes a step wait."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable

from serve.devices import be_nice

log = logging.getLogger(__name__)

Task = Callable[[], None]

_LOOK_S = 0.1


class VaeThread:
    """One piece of work at a time, in order of arrival; previews after everything else.

    A task raises nothing: whoever hands it over tells of its outcome inside it. One that raises all the same ends the
    thread, and `lost` is told, on this thread: nothing that waits here is begun any more.

    Owns: the thread.
    """

    def __init__(self, lost: Callable[[BaseException], None], niceness: int = 0) -> None:
        self._lost = lost
        self._niceness = niceness
        self._tasks: queue.PriorityQueue[tuple[bool, int, Task | threading.Event | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._busy_since: float | None = None
        self._ended_at = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="vae", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def busy_s(self) -> float:
        """Seconds since the task under way began; 0 between tasks."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def submit(self, task: Task, *, preview: bool = False) -> None:
        self._tasks.put((preview, next(self._numbers), task))

    def settle(self) -> float:
        """Return once all that was submitted is done, previews too; at once where the thread has ended. When the last
        of it ended (`time.monotonic`), 0 where there never was any."""
        done = threading.Event()
        self._tasks.put((True, next(self._numbers), done))
        while not done.wait(_LOOK_S) and self.alive and not self._closed:
            pass
        return self._ended_at

    def close(self) -> None:
        """Begin no other task, and end the thread once the one under way is done. Returns at once."""
        self._closed = True
        self._tasks.put((False, next(self._numbers), None))  # wakes it where it waits

    def join(self, within_s: float | None = None) -> None:
        self._thread.join(within_s)

    def _work(self) -> None:
        be_nice(self._niceness)
        while True:
            task = self._tasks.get()[2]
            if task is None or self._closed:
                return
            if isinstance(task, threading.Event):
                task.set()
                continue
            self._busy_since = time.monotonic()
            try:
                task()
            except BaseException as error:  # whatever it is, nobody would hear of it here
                log.critical("the thread of the VAE ends: %s", error, exc_info=error)
                self._lost(error)
                return
            finally:
                self._ended_at = time.monotonic()
                self._busy_since = None
