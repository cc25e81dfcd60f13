"""The API's client (`serve.client`) as the commands use it."""

from __future__ import annotations

from collections.abc import Mapping

from serve import client
from serve.client import AsyncClient, Lost, NoServer
from serve.errors import OperatorError, TandemError, Unauthorized
from serve.settings.front import HttpSettings

KEY_VARIABLE = "TANDEM_KEY"
"""Environment variable with an API key: on a command line others on the machine can read it."""
_START = "; start one with `tandem up` or name another with --url"
_HINTS: Mapping[type[TandemError], str] = {
    NoServer: _START,
    Lost: _START,
    Unauthorized: f"; name a key with --key or in {KEY_VARIABLE}",
}


class Client(AsyncClient):
    """One that leaves it to the command what to do about a server that is busy."""

    def __init__(self, url: str, key: str | None = None, *, patience_s: float = 30.0, poll_s: float = 0.5) -> None:
        bearer(key)
        super().__init__(url, key, patience_s=patience_s, busy_s=0.0, poll_s=poll_s)


def local_url(http: HttpSettings) -> str:
    """Where a client on the same machine finds a server with these settings."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(http.host, http.host)
    return f"http://[{host}]:{http.port}" if ":" in host else f"http://{host}:{http.port}"


def bearer(key: str | None) -> Mapping[str, str]:
    """The header that shows an API key; OperatorError, which names the option, for what can't be one."""
    try:
        return client.bearer(key)
    except OperatorError:
        raise OperatorError(f"--key or {KEY_VARIABLE}: that is not an API key", "key") from None


def hint(error: TandemError) -> str:
    """What whoever typed the command may do about it, to be said behind the message."""
    return _HINTS.get(type(error), "")
