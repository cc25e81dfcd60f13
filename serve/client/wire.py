"""The connection under both clients, so that all else is written once.

What a client does is written as coroutines over a `Wire`. `AsyncWire` waits in the event loop. `BlockingWire` has the
same methods, which block and never suspend: a coroutine over it runs to its end in one step (`finished`), without an
event loop and without a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Generator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

import httpx

T = TypeVar("T")


class Wire(Protocol):
    """Every method raises what httpx raises.

    Owns: the HTTP connections.
    """

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response: ...

    def stream(
        self, path: str, headers: Mapping[str, str]
    ) -> AbstractAsyncContextManager[tuple[int, AsyncIterator[str]]]:
        """Status and lines of an answer that comes bit by bit."""
        ...

    async def sleep(self, seconds: float) -> None: ...

    async def close(self) -> None: ...


class AsyncWire:
    def __init__(self, **options: Any) -> None:
        """`options` are httpx's."""
        self._http = httpx.AsyncClient(**options)

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return await self._http.request(method, path, **options)

    @contextlib.asynccontextmanager
    async def stream(self, path: str, headers: Mapping[str, str]) -> AsyncGenerator[tuple[int, AsyncIterator[str]]]:
        async with self._http.stream("GET", path, headers=headers) as answer:
            yield answer.status_code, answer.aiter_lines()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        await self._http.aclose()


class BlockingWire:
    def __init__(self, **options: Any) -> None:
        """`options` are httpx's."""
        self._http = httpx.Client(**options)

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._http.request(method, path, **options)

    @contextlib.asynccontextmanager
    async def stream(self, path: str, headers: Mapping[str, str]) -> AsyncGenerator[tuple[int, AsyncIterator[str]]]:
        with self._http.stream("GET", path, headers=headers) as answer:
            yield answer.status_code, _lines(answer)

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 -- whoever runs this has no event loop

    async def close(self) -> None:
        self._http.close()


async def _lines(answer: httpx.Response) -> AsyncIterator[str]:
    for line in answer.iter_lines():
        yield line


def finished(story: Coroutine[Any, Any, T]) -> T:
    """What a coroutine over a `BlockingWire` returns."""
    try:
        story.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    story.close()
    raise RuntimeError("what runs without an event loop must not wait in one")


def unrolled(stories: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """What an asynchronous generator over a `BlockingWire` yields. It ends when this one is closed."""
    try:
        while True:
            try:
                item = finished(stories.__anext__())
            except StopAsyncIteration:
                return
            yield item
    finally:
        finished(stories.aclose())
