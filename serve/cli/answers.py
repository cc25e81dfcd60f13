"""What the server's answers say: its JSON as frozen dataclasses, its refusals as this project's own errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from serve.domain import CacheReport, JobState, Truncation
from serve.errors import (
    ClientError,
    Forbidden,
    GenerationFailed,
    InvalidRequest,
    JobNotFound,
    OperatorError,
    QueueFull,
    RateLimited,
    TandemError,
    Unauthorized,
    Unavailable,
)

KEY_VARIABLE = "TANDEM_KEY"
"""Environment variable with an API key: on a command line others on the machine can read it."""


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
    """A job as the server tells it. `position` is None unless it waits, `total_s` until it has ended; `eta_s` predicts
    that. `raw` is the JSON itself."""

    id: str
    model: str
    seed: int
    position: int | None
    eta_s: float | None
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


def refusal(answer: httpx.Response) -> TandemError:
    """The error that the answer spells, in this project's own tree."""
    status = answer.status_code
    try:
        error = answer.json()["error"]
        message, param, code = str(error["message"]), error.get("param"), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        host = answer.request.url.netloc.decode()
        return OperatorError(f"{host} answered {status}; that is not a Tandem server", "url")
    if status in (429, 503):
        wait = answer.headers.get("retry-after", "")
        kind = RateLimited if status == 429 else QueueFull if code == QueueFull.code else Unavailable
        return kind(message, param, float(wait) if wait.isdigit() else None)
    if status == 401:
        return Unauthorized(f"{message}; name a key with --key or in {KEY_VARIABLE}", param)
    if status == 403:
        return Forbidden(message, param)
    if status == 404:
        return JobNotFound(message, param)
    if status >= 500:
        return GenerationFailed(message, param)
    if param and param not in message:
        message = f"{param}: {message}"
    return InvalidRequest(message, param) if param else ClientError(message)


def progress_of(event: Mapping[str, Any]) -> Progress:
    return Progress(state=JobState(event["state"]), step=int(event["step"]), steps=int(event["steps"]))


def job_of(answer: Mapping[str, Any]) -> RemoteJob:
    cache, error = answer.get("cache"), answer.get("error")
    return RemoteJob(
        id=answer["id"],
        state=JobState(answer["state"]),
        step=answer["step"],
        steps=answer["steps"],
        model=answer["request"]["model"],
        seed=answer["request"]["seed"],
        position=answer.get("position"),
        eta_s=answer.get("eta_s"),
        total_s=(answer.get("timings") or {}).get("total_s"),
        cache=CacheReport(**cache) if cache else None,
        truncated=tuple(Truncation(**cut) for cut in answer.get("truncated") or ()),
        images=len(answer.get("images") or ()),
        error=error["message"] if error else None,
        raw=answer,
    )
