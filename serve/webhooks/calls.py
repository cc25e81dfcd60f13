"""One call over HTTP: to the address that was checked, without redirects, bounded in time and size."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpcore
import httpx

from serve.settings.front import WebhookSettings
from serve.webhooks.addresses import public

log = logging.getLogger(__name__)

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The IP addresses of a host. OSError where it has none."""

_ADDRESSES_TRIED = 3
_HTTP_ERRORS = (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError)


class NotPublic(OSError):
    """A name leads to an address that is not called."""


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that it has looked up and checked itself. Nothing resolves the name again between the check
    and the connection, when it may say something else (DNS rebinding). TLS and the Host header still see the name.
    """

    def __init__(self, resolve: Resolve, allow_private: bool) -> None:
        self._resolve = resolve
        self._allow_private = allow_private
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Try the addresses in their order, each for its share of the time. NotPublic if any of them is not."""
        addresses = await self._resolve(host, port)
        if not self._allow_private and not all(map(public, addresses)):
            raise NotPublic("the host has an address that is not public")
        tried = addresses[:_ADDRESSES_TRIED]
        share_s = timeout and timeout / max(1, len(tried))
        failure: Exception = httpcore.ConnectError("the host has no address")
        for address in tried:
            try:
                return await self._network.connect_tcp(address, port, share_s, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class Caller:
    """Makes the calls. Every call has a connection of its own: nothing of one receiver's reaches another's, and each is
    checked anew.

    Owns: the threads that resolve names, because a name server that does not answer must not hold those which the rest
    of the process reads files with.
    """

    def __init__(self, settings: WebhookSettings, threads: int, resolve: Resolve | None = None) -> None:
        self._timeout_s = settings.timeout_s
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="webhook-names")
        self._backend = CheckedBackend(resolve or self._look_up, settings.allow_private)
        self._tls = httpx.create_ssl_context()

    async def post(self, url: httpx.URL, headers: Mapping[str, str], body: bytes) -> int | None:
        """The answer's status; its body is not read. None where there was no answer in time, or the host has an address
        that is not called."""
        status: int | None = None
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                httpcore.AsyncConnectionPool(ssl_context=self._tls, network_backend=self._backend) as connections,
                connections.stream(
                    "POST",
                    httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                    headers=[("host", url.netloc), ("connection", "close"), *headers.items()],
                    content=body,
                    extensions={"timeout": {"connect": self._timeout_s}},
                ) as answer,
            ):
                status = answer.status
        except (TimeoutError, OSError, *_HTTP_ERRORS) as error:
            if status is None:
                # Not the whole URL: its path and query may hold secrets of the receiver's.
                log.info("calling the webhook at %s: %s %s", url.netloc.decode("ascii"), type(error).__name__, error)
        return status

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _look_up(self, host: str, port: int) -> Sequence[str]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, _addresses, host, port)


def _addresses(host: str, port: int) -> Sequence[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(place[0]) for *_, place in found]
