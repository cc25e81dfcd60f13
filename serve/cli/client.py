"""A client of the native HTTP API: create, follow, cancel, fetch; encode text, look after its cache.

Python's `httpx`, nothing of the server's code.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

import httpx

from serve.cli.answers import KEY_VARIABLE, Pool, Progress, RemoteJob, RemoteText, job_of, progress_of, refusal
from serve.domain import CacheReport, Truncation
from serve.errors import OperatorError, QueueFull, RateLimited, Unavailable
from serve.settings import HttpSettings

_ENCODE_S = 180.0
"""Longest wait for a text: its encoder may have to be started for it."""
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def local_url(http: HttpSettings) -> str:
    """Where a client on the same machine finds a server with these settings."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(http.host, http.host)
    return f"http://[{host}]:{http.port}" if ":" in host else f"http://{host}:{http.port}"


class Client:
    """Talks to one server.

    Owns: the HTTP connections; use it as an async context manager.

    Every method raises OperatorError when nothing answers at the address, Unavailable (QueueFull, RateLimited) when the
    server asks to come back later, and ClientError (InvalidRequest with `param`, JobNotFound, Unauthorized, Forbidden)
    when it refuses.
    """

    def __init__(self, url: str, key: str | None = None, *, patience_s: float = 30.0, poll_s: float = 0.5) -> None:
        """`key` is an API key, for a server that wants one. `create` and `follow` bear a server that goes away for
        `patience_s`, and ask again after `poll_s`."""
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > 65535:
            raise OperatorError(f"{url} is not an http:// or https:// address", "url")
        self.url = url.rstrip("/")
        self._patience_s = patience_s
        self._poll_s = poll_s
        # A proxy from the environment has no way to this machine's own loopback address.
        trust_env = parsed.host not in _LOOPBACK
        timeout = httpx.Timeout(30.0, connect=5.0)
        self._http = httpx.AsyncClient(base_url=self.url, headers=bearer(key), timeout=timeout, trust_env=trust_env)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def pools(self) -> tuple[Pool, ...] | None:
        """The server's parts, ready or not; None when no Tandem server answers."""
        try:
            answer = await self._http.get("/readyz")
            parts = answer.json()["pools"]
            return tuple(Pool(name=name, ready=part["ready"], detail=part["detail"]) for name, part in parts.items())
        except (httpx.TransportError, ValueError, KeyError, TypeError, AttributeError):
            return None

    async def create(self, order: Mapping[str, Any]) -> RemoteJob:
        """Queue a job; `order` holds the fields of `POST /v1/jobs`, and those that are None are left out.

        An order whose answer is lost is sent again: its Idempotency-Key sees to it that there is one job.
        """
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        lost_at: float | None = None
        while True:
            try:
                return job_of((await self._post("/v1/jobs", order, headers=headers)).json())
            except (OperatorError, Unavailable) as error:
                if lost_at is None and isinstance(error, _Lost):
                    lost_at = time.monotonic()
                # A server that has no room or no leave for the order has no job of it either.
                if lost_at is None or isinstance(error, QueueFull | RateLimited):
                    raise
                if time.monotonic() - lost_at > self._patience_s:
                    raise _uncertain(self.url) from error
            await asyncio.sleep(self._poll_s)

    async def get(self, job_id: str) -> RemoteJob:
        return job_of((await self._call("GET", f"/v1/jobs/{job_id}")).json())

    async def newest(self, number: int) -> list[RemoteJob]:
        """The newest jobs that succeeded, at most so many."""
        found: list[RemoteJob] = []
        cursor: str | None = None
        while len(found) < number:
            query = {"state": "succeeded", "limit": min(100, number - len(found))} | (
                {"cursor": cursor} if cursor else {}
            )
            page = (await self._call("GET", "/v1/jobs", params=query)).json()
            found += map(job_of, page["data"])
            cursor = page["next"]
            if cursor is None:
                break
        return found

    async def cancel(self, job_id: str) -> RemoteJob:
        return job_of((await self._call("DELETE", f"/v1/jobs/{job_id}")).json())

    async def image(self, job_id: str, index: int) -> bytes:
        """The file of one image, from the server or from the store that it points to."""
        return (await self._call("GET", f"/v1/images/{job_id}/{index}", follow_redirects=True)).content

    async def encode(self, order: Mapping[str, Any]) -> RemoteText:
        """Have a text encoded, for the cache alone; `order` holds the fields of `POST /v1/embeddings`."""
        answer = (await self._post("/v1/embeddings", {**order, "output": "report"}, timeout=_ENCODE_S)).json()
        return RemoteText(
            model=answer["model"],
            cache=CacheReport(**answer["cache"]),
            truncated=tuple(Truncation(**cut) for cut in answer["truncated"]),
        )

    async def analyze(self, order: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a prompt comes to: the JSON of `POST /v1/prompts/analyze`."""
        found: Mapping[str, Any] = (await self._post("/v1/prompts/analyze", order)).json()
        return found

    async def compare(self, order: Mapping[str, Any]) -> Mapping[str, Any]:
        """How near texts are to one another: the JSON of `POST /v1/prompts/similarity`."""
        found: Mapping[str, Any] = (await self._post("/v1/prompts/similarity", order, timeout=_ENCODE_S)).json()
        return found

    async def cache(self) -> Mapping[str, Any]:
        """The JSON of `GET /v1/cache`."""
        state: Mapping[str, Any] = (await self._call("GET", "/v1/cache")).json()
        return state

    async def clear_cache(self) -> int:
        """How many embeddings were removed."""
        return int((await self._call("DELETE", "/v1/cache")).json()["removed"])

    async def follow(self, job_id: str) -> AsyncGenerator[Progress]:
        """Every step as it happens, until the job has ended.

        A stream that breaks is resumed after the last event that arrived. Between two streams the job is asked for
        once, so that a network which lets no stream pass still sees progress.
        """
        last: str | None = None
        heard = time.monotonic()
        while True:
            try:
                async with aclosing(self._stream(job_id, last)) as stream:
                    async for last, progress in stream:  # noqa: B007 -- where the next stream resumes
                        heard = time.monotonic()
                        yield progress
                        if progress.state.terminal:
                            return
                job = await self.get(job_id)
                heard = time.monotonic()
                yield job
                if job.state.terminal:
                    return
            except (httpx.TransportError, OperatorError, Unavailable) as error:
                if time.monotonic() - heard > self._patience_s:
                    raise _away(self.url) from error
            await asyncio.sleep(self._poll_s)

    async def _stream(self, job_id: str, after: str | None) -> AsyncGenerator[tuple[str | None, Progress]]:
        """(event id, progress) of one connection to the job's events; ends without a word if there is no stream."""
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
        async with self._http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
            if answer.status_code != 200:
                return
            event_id, data = after, ""
            async for line in answer.aiter_lines():
                name, _, value = line.partition(":")
                if name == "id":
                    event_id = value.strip()
                elif name == "data":
                    data += value.removeprefix(" ")
                elif not line and data:
                    event, data = json.loads(data), ""
                    if "state" in event:
                        yield event_id, progress_of(event)

    async def _post(
        self, path: str, order: Mapping[str, Any], headers: Mapping[str, str] | None = None, **options: Any
    ) -> httpx.Response:
        # Not httpx's own JSON, which raises for NaN: the server refuses it and names the field.
        body = json.dumps({name: value for name, value in order.items() if value is not None})
        headers = {"Content-Type": "application/json", **(headers or {})}
        return await self._call("POST", path, content=body, headers=headers, **options)

    async def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = await self._http.request(method, path, **options)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise _away(self.url) from error
        except httpx.TransportError as error:
            raise _Lost(_away(self.url).message, "url") from error
        if answer.is_success:
            return answer
        raise refusal(answer)


class _Lost(OperatorError):
    """The connection broke after it had been made: what was sent may have arrived."""


def bearer(key: str | None) -> Mapping[str, str]:
    """The header that shows an API key; OperatorError for what can't be one, which is never printed."""
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise OperatorError(f"--key or {KEY_VARIABLE}: that is not an API key", "key")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _away(url: str) -> OperatorError:
    return OperatorError(f"no server answers at {url}; start one with `tandem up` or name another with --url", "url")


def _uncertain(url: str) -> OperatorError:
    return OperatorError(
        f"the server at {url} went away while it took the order, which may be queued all the same", "url"
    )
