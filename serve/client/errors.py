"""What goes wrong for a client, in the server's own tree of errors (`serve.errors`), and what only a client meets.

OperatorError
└── NoServer            nothing answers at the address
    ├── Lost            the connection broke after it had been made: what was sent may have arrived
    └── NotTandem       something else answers there
GenerationFailed
└── JobFailed           the job has ended without pictures; `job` says why
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import httpx

from serve import errors
from serve.errors import (
    ClientError,
    Forbidden,
    GenerationFailed,
    InvalidRequest,
    JobNotFound,
    OperatorError,
    RateLimited,
    TandemError,
    Unauthorized,
    Unavailable,
)

if TYPE_CHECKING:
    from serve.client.answers import Job


class NoServer(OperatorError):
    """Nothing answers at the address."""


class Lost(NoServer):
    """The connection broke after it had been made: what was sent may have arrived."""


class NotTandem(NoServer):
    """Something else answers there, or a server of another time."""


class JobFailed(GenerationFailed):
    """The job has ended, and not with pictures."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.error.message if job.error else f"job {job.id} is {job.state}")
        self.args = (job,)
        self.job = job
        self.code = job.error.code if job.error else job.state.value


_BY_CODE: Mapping[str, type[TandemError]] = {
    kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TandemError)
}
_BY_STATUS: Mapping[int, type[TandemError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: JobNotFound,
    429: RateLimited,
    503: Unavailable,
}


def refusal(answer: httpx.Response) -> TandemError:
    """The error that the answer spells. Its own code says which; one that is not known here has its status'."""
    try:
        error = answer.json()["error"]
        message, param, code = str(error["message"]), error.get("param"), str(error.get("code"))
    except (ValueError, KeyError, TypeError, AttributeError):
        host = answer.request.url.netloc.decode()
        return NotTandem(f"{host} answered {answer.status_code}; that is not a Tandem server", "url")
    kind = _kind(answer.status_code, code, param)
    if issubclass(kind, InvalidRequest) and param and param not in message:
        message = f"{param}: {message}"
    return kind(message, param, _wait_s(answer) if issubclass(kind, Unavailable) else None)


def _kind(status: int, code: str, param: str | None) -> type[TandemError]:
    known = _BY_CODE.get(code)
    if known is not None and issubclass(known, ClientError | Unavailable | GenerationFailed):
        return known
    if status >= 500:
        return _BY_STATUS.get(status, GenerationFailed)
    return _BY_STATUS.get(status, InvalidRequest if param else ClientError)


def _wait_s(answer: httpx.Response) -> float | None:
    wait = answer.headers.get("retry-after", "")
    return float(wait) if wait.isdecimal() else None
