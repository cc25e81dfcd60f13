"""Where a server may listen."""

from __future__ import annotations

import errno
import socket

from serve.errors import OperatorError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Addresses that no other machine reaches."""


def check_port(host: str, port: int) -> None:
    """OperatorError, naming `http.port` or `http.host`, unless a server could listen there now."""
    try:
        bind(host, port)
    except OSError as error:
        setting = "http.port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "http.host"
        raise OperatorError(f"{setting}: {host}:{port}: {error.strerror}", setting) from None


def bind(host: str, port: int) -> None:
    """OSError unless a server could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
