"""The two clients of the native API. `AsyncClient` has the methods; `Client` has the same ones, which block."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from serve.client.methods import Methods
from serve.client.wire import AsyncWire, BlockingWire, finished, unrolled

P = ParamSpec("P")
T = TypeVar("T")


class AsyncClient(Methods):
    """Talks to one server, from an event loop. Use it as an async context manager, or close it."""

    _wires = AsyncWire

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()


class _Blocking(Methods):
    _wires = BlockingWire


def _blocks(method: Callable[Concatenate[Methods, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[Client, P], T]:
    def called(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return finished(method(self.methods, *args, **kwargs))

    functools.update_wrapper(called, method)
    return called


def _iterates(
    method: Callable[Concatenate[Methods, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Client, P], Generator[T, None, None]]:
    def called(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        return unrolled(method(self.methods, *args, **kwargs))

    functools.update_wrapper(called, method)
    return called


class Client:
    """Talks to one server and blocks meanwhile. Use it as a context manager, or close it. The methods are those of
    `AsyncClient`; what is an asynchronous iterator there is a plain one here."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        patience_s: float = 30.0,
        busy_s: float = 60.0,
        poll_s: float = 0.5,
    ) -> None:
        """As of an AsyncClient."""
        self.methods = _Blocking(url, key, patience_s=patience_s, busy_s=busy_s, poll_s=poll_s)
        self.url = self.methods.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        finished(self.methods.close())

    generate = _blocks(Methods.generate)
    submit = _blocks(Methods.submit)
    quote = _blocks(Methods.quote)
    get = _blocks(Methods.get)
    jobs = _iterates(Methods.jobs)
    follow = _iterates(Methods.follow)
    wait = _blocks(Methods.wait)
    pictures = _blocks(Methods.pictures)
    image = _blocks(Methods.image)
    cancel = _blocks(Methods.cancel)
    models = _blocks(Methods.models)
    fleet = _blocks(Methods.fleet)
    limits = _blocks(Methods.limits)
    analyze = _blocks(Methods.analyze)
    compare = _blocks(Methods.compare)
    embed = _blocks(Methods.embed)
    encode = _blocks(Methods.encode)
    caption = _blocks(Methods.caption)
    cache = _blocks(Methods.cache)
    clear_cache = _blocks(Methods.clear_cache)
    pools = _blocks(Methods.pools)
    post = _blocks(Methods.post)
