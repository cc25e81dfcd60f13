"""The first cache tier: this process's memory."""

from __future__ import annotations

from collections import OrderedDict

ENTRY_OVERHEAD = 256
"""Bytes that an entry costs beside its value: key, node of the table, headers of the two objects."""


class ByteLru:
    """Values by key, at most `capacity` bytes; what was used longest ago goes first. Not thread-safe.

    Owns: the values. They are immutable, so that handing one out needs no copy.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = 0
        self._values: OrderedDict[str, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: str) -> bool:
        """Without counting as a use."""
        return key in self._values

    def get(self, key: str) -> bytes | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: str, value: bytes) -> None:
        """A value that alone exceeds the capacity is not kept: it would push out everything and then itself."""
        self._drop(key)
        if _cost(value) > self.capacity:
            return
        self._values[key] = value
        self.bytes += _cost(value)
        while self.bytes > self.capacity:
            self._drop(next(iter(self._values)))

    def clear(self) -> None:
        self._values.clear()
        self.bytes = 0

    def check_integrity(self) -> None:
        assert self.bytes == sum(map(_cost, self._values.values())) <= max(self.capacity, 0)

    def _drop(self, key: str) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self.bytes -= _cost(value)


def _cost(value: bytes) -> int:
    return len(value) + ENTRY_OVERHEAD
