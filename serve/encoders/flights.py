"""Single flight within a process: what several callers want is loaded once, for as long as one of them waits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")
Load = Callable[["Flight[Value]"], Coroutine[Any, Any, None]]


class Flight(Generic[Value]):
    """One load on its way, with a future for each key. `offered` is what others came by meanwhile, by key: the load
    looks there before it works."""

    def __init__(self, keys: Iterable[str], load: Load[Value], *, pinned: bool) -> None:
        loop = asyncio.get_running_loop()
        self.landings: dict[str, asyncio.Future[Value]] = {key: loop.create_future() for key in keys}
        self.offered: dict[str, Value] = {}
        self.callers = 1 if pinned else 0
        self.task = loop.create_task(load(self))


class Flights(Generic[Value]):
    """At most one flight per key, except that a new one may start while one that nobody wanted any more winds up.

    Belongs to one event loop.

    Owns: the tasks of the loads, until they end, and how many callers wait for each.
    """

    def __init__(self) -> None:
        self._by_key: dict[str, Flight[Value]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def __len__(self) -> int:
        """Keys on their way."""
        return len(self._by_key)

    def launch(self, keys: Iterable[str], load: Load[Value], *, pinned: bool = False) -> None:
        """Start to load `keys`, none of which is on its way; `load` lands them, sooner or later, or raises. A flight
        that isn't `pinned` must be joined at once."""
        flight = Flight(keys, load, pinned=pinned)
        self._by_key.update(dict.fromkeys(flight.landings, flight))
        self._tasks.add(flight.task)
        flight.task.add_done_callback(lambda task: self._end(flight, task))

    def offer(self, key: str, value: Value) -> bool:
        """Hand a value to the flight that wants it; False where none does. The first offer stays."""
        flight = self._by_key.get(key)
        if flight is not None:
            flight.offered.setdefault(key, value)
        return flight is not None

    def land(self, flight: Flight[Value], values: Mapping[str, Value]) -> None:
        """Who waits for one of these has it, whatever becomes of the rest of the flight."""
        for key, value in values.items():
            self._forget(flight, key)
            if not flight.landings[key].done():
                flight.landings[key].set_result(value)

    @contextlib.contextmanager
    def held(self, flight: Flight[Value]) -> Iterator[None]:
        """Meanwhile the flight doesn't end for a lack of callers."""
        flight.callers += 1
        try:
            yield
        finally:
            self._leave(flight)

    async def join(self, keys: Iterable[str]) -> dict[str, Value]:
        """Wait for `keys`, all of which are on their way. Raises what a load raised, to all who wait for what it did
        not land.

        A cancelled caller leaves a flight to the others; the last one to leave ends it.
        """
        joined = {key: self._by_key[key] for key in keys}
        landings = {key: flight.landings[key] for key, flight in joined.items()}
        flights = set(joined.values())
        for flight in flights:
            flight.callers += 1
        try:
            done, _ = await asyncio.wait(landings.values(), return_when=asyncio.FIRST_EXCEPTION)
            for landing in done:
                landing.result()
            return {key: landing.result() for key, landing in landings.items()}
        finally:
            for flight in flights:
                self._leave(flight)

    async def close(self) -> None:
        """End all flights: who waits for one is cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check_integrity(self) -> None:
        for key, flight in self._by_key.items():
            assert not flight.landings[key].done() or flight.task.done()
            assert flight.callers > 0 or flight.task.done()

    def _leave(self, flight: Flight[Value]) -> None:
        flight.callers -= 1
        if not flight.callers and not all(landing.done() for landing in flight.landings.values()):
            for key in flight.landings:
                self._forget(flight, key)
            flight.task.cancel()

    def _end(self, flight: Flight[Value], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        for key, landing in flight.landings.items():
            self._forget(flight, key)
            if landing.done():
                continue
            if error is None:
                landing.cancel()
            else:
                landing.set_exception(error)
                landing.exception()  # every caller may be gone, and then nobody else looks at it

    def _forget(self, flight: Flight[Value], key: str) -> None:
        if self._by_key.get(key) is flight:
            del self._by_key[key]
