"""One call after the other: what is sent again, how long, and what is made of the answers."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import httpx

from serve.client.answers import Progress, event_of
from serve.client.errors import Lost, NoServer, NotTandem, refusal
from serve.client.wire import Wire
from serve.errors import OperatorError, QueueFull, RateLimited, Unavailable

ENCODE_S = 180.0
"""Longest wait for a text: its encoder may have to be started for it."""
CAPTION_S = 480.0
"""Longest wait for a caption: a model that chats may have to be loaded for it."""
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Calls:
    """Calls of one server.

    A connection that breaks is made again for `patience_s`, and so is one to a server that just was there. A server
    that has no room, or a caller's allowance that is used up, is asked again as often as `Retry-After` lets it within
    `busy_s`. All that is sent here may be sent twice: an order has its `Idempotency-Key`.
    """

    def __init__(self, wire: Wire, url: str, *, patience_s: float, busy_s: float, poll_s: float) -> None:
        self._wire = wire
        self._url = url
        self._patience_s = patience_s
        self._busy_s = busy_s
        self._poll_s = poll_s

    async def close(self) -> None:
        await self._wire.close()

    async def ask(self, method: str, path: str, *, met: bool = False, **options: Any) -> httpx.Response:
        """`met`: the server was there just now. Raises as every method of a client does, and Lost where something may
        have arrived before the server was given up."""
        began, gone_at, lost = time.monotonic(), None, False
        while True:
            try:
                return await self.once(method, path, **options)
            except (NoServer, Unavailable) as error:
                now = time.monotonic()
                lost = lost or isinstance(error, Lost)
                gone_at = now if gone_at is None and (lost or met) else gone_at
                pause = self._pause(error, now - began, None if gone_at is None else now - gone_at)
                if pause is None:
                    if lost and not isinstance(error, Lost | QueueFull | RateLimited | NotTandem):
                        raise Lost(error.message, error.param) from error
                    raise
            await self._wire.sleep(pause)

    async def json(self, method: str, path: str, *, body: bytes | None = None, **options: Any) -> Mapping[str, Any]:
        """As `ask` does; the JSON of the answer, which is an object everywhere. Raises NotTandem where it is not."""
        if body is not None:
            headers = {"Content-Type": "application/json", **options.pop("headers", {})}
            options |= {"content": body, "headers": headers}
        answer = await self.ask(method, path, **options)
        with contextlib.suppress(ValueError):
            found = answer.json()
            if isinstance(found, dict):
                return found
        raise NotTandem(f"what {self._url} answers is no JSON; that is not a Tandem server", "url")

    async def once(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Sent once."""
        try:
            answer = await self._wire.ask(method, path, **options)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise NoServer(_nobody(self._url), "url") from error
        except httpx.TransportError as error:
            raise Lost(_nobody(self._url), "url") from error
        if answer.is_success:
            return answer
        raise refusal(answer)

    async def readiness(self) -> Any:
        """The JSON of `/readyz`, whose status says the same. Raises httpx.TransportError, ValueError."""
        return (await self._wire.ask("GET", "/readyz")).json()

    async def follow(self, job_id: str, *, previews: bool) -> AsyncGenerator[Progress, None]:
        """A stream that breaks is resumed after the last event that arrived. Between two streams the job is asked for
        once, so that a network which lets no stream pass still sees progress."""
        last: str | None = None
        heard = time.monotonic()
        path = f"/v1/jobs/{job_id}"
        while True:
            try:
                async with aclosing(self._events(path, last, previews)) as events:
                    async for last, event in events:  # noqa: B007 -- where the next stream resumes
                        heard = time.monotonic()
                        yield event
                        if event.state.terminal:
                            return
                job = event_of((await self.once("GET", path)).json())
                heard = time.monotonic()
                yield job
                if job.state.terminal:
                    return
            except (httpx.TransportError, OperatorError, Unavailable, ValueError) as error:
                if time.monotonic() - heard > self._patience_s:
                    raise NoServer(_nobody(self._url), "url") from error
            await self._wire.sleep(self._poll_s)

    async def _events(
        self, path: str, after: str | None, previews: bool
    ) -> AsyncGenerator[tuple[str | None, Progress], None]:
        """(event id, progress) of one connection to the job's events; ends without a word if there is no stream."""
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
        query = "" if previews else "?previews=false"
        async with self._wire.stream(f"{path}/events{query}", headers) as (status, lines):
            if status != 200:
                return
            event_id, data = after, ""
            async for line in lines:
                name, _, value = line.partition(":")
                if name == "id":
                    event_id = value.strip()
                elif name == "data":
                    data += value.removeprefix(" ")
                elif not line and data:
                    event, data = json.loads(data), ""
                    if isinstance(event, dict) and "state" in event:
                        yield event_id, event_of(event)

    def _pause(self, error: NoServer | Unavailable, waited_s: float, gone_s: float | None) -> float | None:
        """Seconds until it is sent again; None where it is not. `gone_s`: for so long the server has been away, after
        it was there."""
        if isinstance(error, Unavailable):
            pause = self._poll_s if error.retry_after_s is None else error.retry_after_s
            if waited_s + pause <= self._busy_s:
                return pause
        # A server that has no room or no leave for the order has no job of it either.
        if gone_s is None or gone_s > self._patience_s or isinstance(error, NotTandem | QueueFull | RateLimited):
            return None
        return self._poll_s


def options_of(url: str, key: str | None) -> Mapping[str, Any]:
    """httpx's options for a server. Raises OperatorError for what is no address or no key."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > 65535:
        raise OperatorError(f"{url} is not an http:// or https:// address", "url")
    return {
        "base_url": url.rstrip("/"),
        "headers": bearer(key),
        "timeout": httpx.Timeout(30.0, connect=5.0),
        # A proxy from the environment has no way to this machine's own loopback address.
        "trust_env": parsed.host not in _LOOPBACK,
    }


def bearer(key: str | None) -> Mapping[str, str]:
    """The header that shows an API key; OperatorError for what can't be one, which is never printed."""
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise OperatorError("key: that is not an API key", "key")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _nobody(url: str) -> str:
    return f"no server answers at {url}"
