"""A client of the native HTTP API: create, follow, cancel, fetch; encode text, look after its cache.

Python's `httpx`, nothing of the server's code.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from serve.domain import CacheReport, JobState, Truncation
from serve.errors import ClientError, GenerationFailed, InvalidRequest, JobNotFound, OperatorError, Unavailable
from serve.settings import HttpSettings

_ENCODE_S = 180.0
"""Longest wait for a text: its encoder may have to be started for it."""
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def local_url(http: HttpSettings) -> str:
    """Where a client on the same machine finds a server with these settings."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(http.host, http.host)
    return f"http://[{host}]:{http.port}" if ":" in host else f"http://{host}:{http.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """One part of the server, as `/readyz` tells it."""

    name: str
    ready: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a job stands; `step` counts denoising steps done out of `steps`."""

    state: JobState
    step: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteJob(Progress):
    """A job as the server tells it. `total_s` is None until it has ended; `raw` is the JSON itself."""

    id: str
    model: str
    seed: int
    position: int | None
    total_s: float | None
    cache: CacheReport | None
    truncated: tuple[Truncation, ...]
    images: int
    error: str | None
    raw: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteText:
    """What the server says of a text that it has encoded."""

    model: str
    cache: CacheReport
    truncated: tuple[Truncation, ...]


class Client:
    """Talks to one server.

    Owns: the HTTP connections; use it as an async context manager.

    Every method raises OperatorError when nothing answers at the address, Unavailable when the server asks to come
    back later, and ClientError (InvalidRequest with `param`, JobNotFound) when it refuses.
    """

    def __init__(self, url: str, *, patience_s: float = 30.0, poll_s: float = 0.5) -> None:
        """`follow` bears a server that is away for `patience_s`, and asks again after `poll_s`."""
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
        self._http = httpx.AsyncClient(base_url=self.url, timeout=timeout, trust_env=trust_env)

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
        """Queue a job; `order` holds the fields of `POST /v1/jobs`, and those that are None are left out."""
        return _job((await self._post("/v1/jobs", order)).json())

    async def get(self, job_id: str) -> RemoteJob:
        return _job((await self._call("GET", f"/v1/jobs/{job_id}")).json())

    async def cancel(self, job_id: str) -> RemoteJob:
        return _job((await self._call("DELETE", f"/v1/jobs/{job_id}")).json())

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
                        yield event_id, _progress(event)

    async def _post(self, path: str, order: Mapping[str, Any], **options: Any) -> httpx.Response:
        # Not httpx's own JSON, which raises for NaN: the server refuses it and names the field.
        body = json.dumps({name: value for name, value in order.items() if value is not None})
        return await self._call("POST", path, content=body, headers={"Content-Type": "application/json"}, **options)

    async def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = await self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise _away(self.url) from error
        if answer.is_success:
            return answer
        raise _refusal(answer)


def _away(url: str) -> OperatorError:
    return OperatorError(f"no server answers at {url}; start one with `tandem up` or name another with --url", "url")


def _refusal(answer: httpx.Response) -> Exception:
    """The error that the answer spells, in this project's own tree."""
    try:
        error = answer.json()["error"]
        message, param = str(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        host = answer.request.url.netloc.decode()
        return OperatorError(f"{host} answered {answer.status_code}; that is not a Tandem server", "url")
    if answer.status_code in (429, 503):
        wait = answer.headers.get("retry-after", "")
        return Unavailable(message, param, float(wait) if wait.isdigit() else None)
    if answer.status_code == 404:
        return JobNotFound(message, param)
    if answer.status_code >= 500:
        return GenerationFailed(message, param)
    if param and param not in message:
        message = f"{param}: {message}"
    return InvalidRequest(message, param) if param else ClientError(message)


def _progress(event: Mapping[str, Any]) -> Progress:
    return Progress(state=JobState(event["state"]), step=int(event["step"]), steps=int(event["steps"]))


def _job(answer: Mapping[str, Any]) -> RemoteJob:
    cache, error = answer.get("cache"), answer.get("error")
    return RemoteJob(
        id=answer["id"],
        state=JobState(answer["state"]),
        step=answer["step"],
        steps=answer["steps"],
        model=answer["request"]["model"],
        seed=answer["request"]["seed"],
        position=answer.get("position"),
        total_s=(answer.get("timings") or {}).get("total_s"),
        cache=CacheReport(**cache) if cache else None,
        truncated=tuple(Truncation(**cut) for cut in answer.get("truncated") or ()),
        images=len(answer.get("images") or ()),
        error=error["message"] if error else None,
        raw=answer,
    )
