"""The server that runs, where one does: is it one of ours, of this version, and ready?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from serve import __version__
from serve.doctor.findings import Finding, fault, ok, warning

ASK_S = 5.0


@dataclass(frozen=True, slots=True)
class Server:
    """`serving`: one of ours answers at the URL."""

    serving: bool
    findings: tuple[Finding, ...]


def check_server(url: str) -> Server:
    """No server at all is fine: this is about one that is to be started."""
    try:
        with httpx.Client(base_url=url, timeout=ASK_S) as client:
            health = _object(client.get("/healthz"))
            if health.get("status") != "ok":
                told = f"what answers at {url} is no Tandem"
                return Server(False, (fault("server-foreign", "http.port", told, "another http.port, or --url"),))
            ready = _object(client.get("/readyz"))
    except (httpx.HTTPError, httpx.InvalidURL):
        return Server(False, (ok("server", "server", f"none answers at {url}"),))
    return Server(True, (_version(url, str(health.get("version", "of before `tandem doctor`"))), *_pools(ready)))


def _version(url: str, running: str) -> Finding:
    if running == __version__:
        return ok("server", "server", f"Tandem {running} answers at {url}")
    told = f"Tandem {running} answers at {url}, and this command is {__version__}"
    return warning("server-version", "server", told, "use the command of the server's own version, or roll it out")


def _pools(ready: dict[str, Any]) -> list[Finding]:
    pools: dict[str, Any] = ready.get("pools", {})
    waiting = [
        fault("server-not-ready", "server", f"{name} is not ready: {pool.get('detail')}", "its replicas' logs say why")
        for name, pool in pools.items()
        if not pool.get("ready")
    ]
    return waiting or [ok("server", "server", f"every pool is ready: {', '.join(pools)}")]


def _object(answer: httpx.Response) -> dict[str, Any]:
    """Of JSON; empty for anything else."""
    try:
        told = answer.json()
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
