"""Single flight across replicas: whoever holds a unit's lease encodes it, the others wait for the value.

A lease only saves work. It is short, nobody waits longer than one lease lasts, and without Redis everybody encodes at
once: two replicas with the same text are no fault, because the first to store its value wins (`RedisTier.put`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from serve.encoders.redis_tier import Claimed, RedisTier
from serve.encoders.together import Together

Encode = Callable[[Sequence[str]], Coroutine[Any, Any, None]]
"""Encodes, stores and hands on what it is asked for."""
Found = Callable[[Mapping[str, bytes]], None]
Claims = Together[Claimed | None]

_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.005, 0.05


class Leases:
    """Belongs to one event loop.

    Owns: the leases that this process holds, for as long as it encodes.
    """

    def __init__(self, tier: RedisTier, seconds: float) -> None:
        """`seconds`: the longest that a lease, and so a wait for one, lasts."""
        self._tier = tier
        self._seconds = seconds
        self._under_way: set[asyncio.Task[Any]] = set()

    def claims(self) -> Claims:
        """For fillings that begin together: their claims share round trips."""
        return Together(lambda keys: self._tier.claim(keys, self._seconds), self._under_way)

    async def fill(self, keys: Sequence[str], claims: Claims, encode: Encode, found: Found) -> None:
        """Have each key encoded here, or `found` where another replica has stored it meanwhile.

        `encode` is called at once for the keys whose lease is free, and later for those whose lease ran out or was
        given back unused. Raises what it raises.
        """
        loop = asyncio.get_running_loop()
        deadline, look_s = loop.time() + self._seconds, _FIRST_LOOK_S
        encodings: list[asyncio.Task[None]] = []
        try:
            while keys := await self._claim(keys, claims, encode, found, encodings):
                if loop.time() >= deadline:
                    encodings.append(_start(encode(keys)))
                    break
                await asyncio.sleep(min(look_s, deadline - loop.time()))
                look_s = min(look_s * 1.5, _LONGEST_LOOK_S)
                for task in encodings:
                    if task.done():
                        task.result()  # raises what went wrong: nobody will wait for the rest
            await asyncio.gather(*encodings)
        finally:
            for task in encodings:
                task.cancel()
            await asyncio.gather(*encodings, return_exceptions=True)

    async def close(self) -> None:
        """After the fillings have ended."""
        while self._under_way:
            await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _claim(
        self, keys: Sequence[str], claims: Claims, encode: Encode, found: Found, encodings: list[asyncio.Task[None]]
    ) -> list[str]:
        """One look: what is stored is `found`, what is ours to encode goes to `encodings`; returns what is others'."""
        claiming = claims.ask(keys)
        try:
            claimed = await asyncio.shield(claiming)
        except asyncio.CancelledError:
            self._in_background(self._decline(keys, claiming))
            raise
        if claimed is None:
            encodings.append(_start(encode(keys)))
            return []
        found({key: claimed.stored[key] for key in keys if key in claimed.stored})
        won = [key for key in keys if key in claimed.won]
        if mine := [key for key in won if key not in claimed.stored]:
            encodings.append(_start(self._encode_held(mine, claimed.token, encode)))
        if unneeded := [key for key in won if key in claimed.stored]:
            self._in_background(self._tier.release(unneeded, claimed.token))
        return [key for key in keys if key not in claimed.won and key not in claimed.stored]

    async def _encode_held(self, keys: Sequence[str], token: str, encode: Encode) -> None:
        try:
            await encode(keys)
        finally:
            self._in_background(self._tier.release(keys, token))  # failed or not, the others need not wait any longer

    async def _decline(self, keys: Sequence[str], claiming: asyncio.Task[Claimed | None]) -> None:
        """Who asked has left, and Redis may give the leases all the same."""
        claimed = await claiming
        if claimed and (won := [key for key in keys if key in claimed.won]):
            await self._tier.release(won, claimed.token)

    def _in_background(self, giving_back: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(giving_back)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)


def _start(encoding: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.get_running_loop().create_task(encoding)
    # Where several fail, the first is raised, and nobody looks at the others.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task
