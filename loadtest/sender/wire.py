"""HTTP on gevent's sockets, as little of it as a load test needs: it shares the processors with the server."""

from __future__ import annotations

import select
import socket
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import gevent.socket
import gevent.ssl
from geventhttpclient.response import HTTPParseError, HTTPSocketPoolResponse

IDLE_S = 2.0
"""A connection that was idle for longer is not used again: servers close theirs after five seconds or more, and an
order that meets such an end is lost."""
_BLOCK = 1 << 16

Broken = (OSError, HTTPParseError)
"""What a connection that broke raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    status: int
    content: bytes
    kind: str
    """The media type."""
    location: str
    retry_after: str


class Wire:
    """Requests to one server over connections that are kept alive, and to those that it redirects to.

    Owns: the idle sockets, each with when it was last used. Raises `Broken`.
    """

    def __init__(self, target: str, key: str | None = None, *, timeout_s: float = 60.0) -> None:
        """`timeout_s` bounds each wait for a connection and for data."""
        parts = urlsplit(target)
        self._tls = gevent.ssl.create_default_context() if parts.scheme == "https" else None
        self._address = (parts.hostname or "", parts.port or (443 if self._tls else 80))
        self._host = parts.hostname
        self._origin = f"{parts.scheme}://{parts.netloc}"
        self._root = parts.path.rstrip("/")
        self._timeout_s = timeout_s
        shown = f"Authorization: Bearer {key}\r\n" if key else ""
        self._head = f"Host: {parts.netloc}\r\nUser-Agent: tandem-loadtest\r\n{shown}"
        self._idle: list[tuple[Any, float]] = []
        self._others: dict[str, Wire] = {}

    def path(self, path: str) -> str:
        """Under which the server has its own `path`, where it is not at the root of its host."""
        return self._root + path

    def open(self, method: str, path: str, body: bytes | None = None, headers: str = "") -> HTTPSocketPoolResponse:
        """The answer when its headers are there. `headers` end each with a line's end."""
        sock = self._socket()
        if body is not None:
            headers += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        try:
            sock.sendall(f"{method} {path} HTTP/1.1\r\n{self._head}{headers}\r\n".encode("latin-1") + (body or b""))
        except BaseException:
            self.release_socket(sock)
            raise
        return HTTPSocketPoolResponse(sock, self, method=method, block_size=_BLOCK)

    def call(self, method: str, path: str, body: bytes | None = None) -> Reply:
        return whole(self.open(method, path, body))

    def elsewhere(self, url: str) -> tuple[Wire, str]:
        """Where a redirect leads: the wire and the path there. The key is for the first server alone."""
        parts = urlsplit(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        origin = f"{parts.scheme}://{parts.netloc}"
        if not parts.netloc or origin == self._origin:
            return self, path
        if origin not in self._others:
            self._others[origin] = Wire(origin, timeout_s=self._timeout_s)
        return self._others[origin], path

    def _socket(self) -> Any:
        while self._idle:
            sock, since = self._idle.pop()
            if time.monotonic() - since <= IDLE_S and not _readable(sock):
                return sock
            sock.close()
        sock = gevent.socket.create_connection(self._address, self._timeout_s)
        self._address = sock.getpeername()[:2]  # a name is resolved once
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock if self._tls is None else self._tls.wrap_socket(sock, server_hostname=self._host)

    def return_socket(self, sock: Any) -> None:
        """The answer has ended, and the connection lives (geventhttpclient's ConnectionPool)."""
        self._idle.append((sock, time.monotonic()))

    def release_socket(self, sock: Any) -> None:
        """The connection is of no more use (geventhttpclient's ConnectionPool)."""
        sock.close()


def whole(answer: HTTPSocketPoolResponse) -> Reply:
    """The answer with all of its content. Raises `Broken`."""
    content = answer.read()
    return Reply(
        status=answer.status_code,
        content=content,
        kind=_header(answer, "content-type"),
        location=_header(answer, "location"),
        retry_after=_header(answer, "retry-after"),
    )


def _readable(sock: Any) -> bool:
    """Of an idle connection it says that the server has closed it."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _header(answer: HTTPSocketPoolResponse, name: str) -> str:
    value = answer.get(name)
    return value if isinstance(value, str) else ""
