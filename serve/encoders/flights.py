"""Single flight within a process: what several callers want is loaded once, for as long as one of them waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")
Load = Callable[["Flight[Value]"], Coroutine[Any, Any, Mapping[str, Value]]]


class Flight(Generic[Value]):
    """One load on its way. `offered` is what others came by meanwhile, by key: the load looks there before it works."""

    def __init__(self, keys: Iterable[str], load: Load[Value], *, pinned: bool) -> None:
        self.keys = tuple(keys)
        self.offered: dict[str, Value] = {}
        self.callers = 1 if pinned else 0
        self.task = asyncio.get_running_loop().create_task(load(self))


class Flights(Generic[Value]):
    """At most one flight per key, except that a new one may start while one that nobody wanted any more winds up.

    Belongs to one event loop.

    Owns: the tasks of the loads under way, and how many callers wait for each.
    """

    def __init__(self) -> None:
        self._by_key: dict[str, Flight[Value]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def __len__(self) -> int:
        """Keys on their way."""
        return len(self._by_key)

    def launch(self, keys: Iterable[str], load: Load[Value], *, pinned: bool = False) -> None:
        """Start to load `keys`, none of which is on its way. A flight that isn't `pinned` must be joined at once."""
        flight = Flight(keys, load, pinned=pinned)
        self._by_key.update(dict.fromkeys(flight.keys, flight))
        flight.task.add_done_callback(lambda task: self._land(flight, task))

    def offer(self, key: str, value: Value) -> bool:
        """Hand a value to the flight that wants it; False where none does. The first offer stays."""
        flight = self._by_key.get(key)
        if flight is not None:
            flight.offered.setdefault(key, value)
        return flight is not None

    async def join(self, keys: Iterable[str]) -> dict[str, Value]:
        """Wait for `keys`, all of which are on their way. Raises what a load raised, to all who wait for it.

        A cancelled caller leaves the flight to the others; the last one to leave ends it.
        """
        joined = {key: self._by_key[key] for key in keys}
        flights = set(joined.values())
        for flight in flights:
            flight.callers += 1
        try:
            done, _ = await asyncio.wait([each.task for each in flights], return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
            return {key: flight.task.result()[key] for key, flight in joined.items()}
        finally:
            for flight in flights:
                flight.callers -= 1
                if not flight.callers and not flight.task.done():
                    self._forget(flight)
                    flight.task.cancel()

    async def close(self) -> None:
        """End all flights: who waits for one is cancelled."""
        tasks = {flight.task for flight in self._by_key.values()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def check_integrity(self) -> None:
        for key, flight in self._by_key.items():
            assert key in flight.keys
            assert flight.callers > 0 or flight.task.done()

    def _land(self, flight: Flight[Value], task: asyncio.Task[Mapping[str, Value]]) -> None:
        self._forget(flight)
        if not task.cancelled():
            task.exception()  # every caller may be gone, and then nobody else looks at it

    def _forget(self, flight: Flight[Value]) -> None:
        for key in flight.keys:
            if self._by_key.get(key) is flight:
                del self._by_key[key]
