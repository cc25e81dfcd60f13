"""Single flight across replicas: whoever holds a unit's lease encodes it, the others wait for the value.

A lease only saves work. It is short, nobody waits longer than one lease lasts, and without Redis everybody encodes at
once: two replicas with the same text are no fault, because the first to store its value wins (`RedisTier.put`).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from serve.encoders.redis_tier import RedisTier

Value = TypeVar("Value")
Encode = Callable[[Sequence[str]], Coroutine[Any, Any, dict[str, Value]]]

_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.005, 0.05


class Leases(Generic[Value]):
    """Belongs to one event loop.

    Owns: the leases that this process holds, for as long as it encodes.
    """

    def __init__(self, tier: RedisTier, seconds: float, found: Callable[[bytes], Value]) -> None:
        """`seconds`: the longest that a lease, and so a wait for one, lasts. `found` makes a value of stored bytes."""
        self._tier = tier
        self._seconds = seconds
        self._found = found
        self._releasing: set[asyncio.Task[None]] = set()

    async def fill(self, keys: Sequence[str], encode: Encode[Value]) -> dict[str, Value]:
        """By key: what `encode` gave (and stored), or `found` of what another replica has stored meanwhile.

        `encode` is called at once for the keys whose lease is free, and later for those whose lease ran out or was
        given back unused. Raises what it raises.
        """
        loop = asyncio.get_running_loop()
        deadline, look_s = loop.time() + self._seconds, _FIRST_LOOK_S
        filled: dict[str, Value] = {}
        encodings: list[asyncio.Task[dict[str, Value]]] = []
        try:
            while keys := await self._claim(keys, encode, filled, encodings):
                if loop.time() >= deadline:
                    encodings.append(_start(encode(keys)))
                    break
                await asyncio.sleep(min(look_s, deadline - loop.time()))
                look_s = min(look_s * 1.5, _LONGEST_LOOK_S)
                for task in encodings:
                    if task.done():
                        task.result()  # raises what went wrong: nobody will wait for the rest
            for values in await asyncio.gather(*encodings):
                filled |= values
            return filled
        finally:
            for task in encodings:
                task.cancel()
            await asyncio.gather(*encodings, return_exceptions=True)

    async def close(self) -> None:
        """After the fillings have ended."""
        await asyncio.gather(*self._releasing)

    async def _claim(
        self,
        keys: Sequence[str],
        encode: Encode[Value],
        filled: dict[str, Value],
        encodings: list[asyncio.Task[dict[str, Value]]],
    ) -> list[str]:
        """One look: what is stored goes to `filled`, what is ours to encode to `encodings`; returns what is others'."""
        token = secrets.token_hex(8)
        claimed = await self._tier.claim(keys, token, self._seconds)
        if claimed is None:
            encodings.append(_start(encode(keys)))
            return []
        filled |= {key: self._found(value) for key, value in claimed.stored.items()}
        if mine := [key for key in keys if key in claimed.won and key not in claimed.stored]:
            encodings.append(_start(self._encode_held(mine, token, encode)))
        self._release([key for key in claimed.won if key in claimed.stored], token)
        return [key for key in keys if key not in claimed.won and key not in claimed.stored]

    async def _encode_held(self, keys: Sequence[str], token: str, encode: Encode[Value]) -> dict[str, Value]:
        try:
            return await encode(keys)
        finally:
            self._release(keys, token)  # failed or not, the others need not wait any longer

    def _release(self, keys: Sequence[str], token: str) -> None:
        if keys:
            task = asyncio.get_running_loop().create_task(self._tier.release(keys, token))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)


def _start(encoding: Coroutine[Any, Any, dict[str, Value]]) -> asyncio.Task[dict[str, Value]]:
    task = asyncio.get_running_loop().create_task(encoding)
    # Where several fail, the first is raised, and nobody looks at the others.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task
