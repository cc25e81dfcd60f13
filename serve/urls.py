"""What of a URL may be shown: never a user, a password or a query."""

from __future__ import annotations

import re

STARS = "**********"
ESCAPES = "/ ? # @ in a password are %2F %3F %23 %40"

# With an @ behind the host nobody knows where a password ends: it may have a / or a # that should have been escaped.
_URL = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<user>[^/?#@]*@)?(?P<host>([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?)"
    r"(?P<path>/[^@?#]*)?([?#][^@]*)?",
    re.IGNORECASE | re.ASCII,
)
_SOCKET = re.compile(r"(unix://)(?P<path>/[^@?#]*)(\?[^@]*)?", re.IGNORECASE)


def shown_url(url: str) -> str:
    """Scheme and host, with stars for whoever stands before it; only stars where it can be read in several ways."""
    socket = _SOCKET.fullmatch(url)
    if socket is not None:
        return f"unix://{socket['path']}"
    found = _URL.fullmatch(url)
    if found is None:
        return STARS
    return f"{found['scheme']}://{f'{STARS}@' if found['user'] else ''}{found['host']}"


def place_of(url: str) -> str | None:
    """The host and port, or the socket's path; None where it can be read in several ways."""
    found = _SOCKET.fullmatch(url) or _URL.fullmatch(url)
    if found is None:
        return None
    return found["host"] if "host" in found.groupdict() else found["path"]


def without_user(text: str) -> str:
    """A setting that is no secret, less whom a URL in it names, and with stars where that can't be told apart."""
    if "@" not in text.partition("://")[2]:
        return text
    found = _URL.fullmatch(text)
    return STARS if found is None else f"{shown_url(text)}{found['path'] or ''}"
