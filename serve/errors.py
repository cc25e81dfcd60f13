"""Every error that crosses a door, in one tree.

    TandemError
    ├── ClientError              the request can't be served as it stands
    │   ├── InvalidRequest       a field is wrong; `param` names it
    │   │   └── Conflict         the id or Idempotency-Key was used for another order
    │   ├── PayloadTooLarge      the body is over the limit
    │   ├── UnsupportedMediaType the body is of a kind that is not read
    │   ├── ModelNotFound        `model` names nothing that is served
    │   ├── JobNotFound          no such job, or no such image of it
    │   ├── JobGone              the order was served; its record's time is over
    │   ├── Unauthorized         no API key, or none that is valid
    │   └── Forbidden            the key has not the scope
    ├── Unavailable              try again after `retry_after_s`
    │   ├── QueueFull            the bound on waiting work is reached
    │   ├── RateLimited          the caller's own allowance is used up; `limits` tells them all
    │   └── BackendUnavailable   Redis, the result store or a pool does not answer
    ├── GenerationFailed         the accepted work could not be finished
    │   ├── NotFinite            the images come out as not-a-number: the same work would again
    │   ├── OutOfMemory          the device had not enough memory for it
    │   └── DeviceLost           the device or the step loop on it is broken; the replica must be replaced
    ├── LeaseLost                internal: another worker owns the job now
    └── OperatorError            a setting or a model is wrong; one line that names it

`api/errors.py` maps each class to a status. Messages are public: they never carry the text of an exception from Ray,
torch or Redis.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve.callers import Limit


class TandemError(Exception):
    """The root. `message` is fit for the client; `param` is the field or setting at fault.

    All constructor arguments are handed to `Exception`, because errors travel between Ray's processes by pickle,
    which rebuilds an exception from `args`.
    """

    code = "internal_error"

    def __init__(self, message: str, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, param, retry_after_s)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class ClientError(TandemError):
    code = "invalid_request"


class InvalidRequest(ClientError):
    code = "invalid_value"


class Conflict(InvalidRequest):
    code = "idempotency_conflict"


class PayloadTooLarge(ClientError):
    code = "payload_too_large"


class UnsupportedMediaType(ClientError):
    code = "unsupported_media_type"


class ModelNotFound(ClientError):
    code = "model_not_found"


class JobNotFound(ClientError):
    code = "not_found"


class JobGone(ClientError):
    code = "gone"


class Unauthorized(ClientError):
    code = "unauthorized"


class Forbidden(ClientError):
    code = "forbidden"


class Unavailable(TandemError):
    code = "unavailable"


class QueueFull(Unavailable):
    code = "queue_full"


class RateLimited(Unavailable):
    code = "rate_limited"

    def __init__(
        self,
        message: str,
        param: str | None = None,
        retry_after_s: float | None = None,
        limits: Sequence[Limit] = (),
    ) -> None:
        super().__init__(message, param, retry_after_s)
        self.args = (message, param, retry_after_s, tuple(limits))
        self.limits = tuple(limits)


class BackendUnavailable(Unavailable):
    code = "backend_unavailable"


class GenerationFailed(TandemError):
    code = "generation_failed"


class NotFinite(GenerationFailed):
    code = "not_finite"


class OutOfMemory(GenerationFailed):
    code = "out_of_memory"


class DeviceLost(GenerationFailed):
    code = "device_lost"


class LeaseLost(TandemError):
    code = "lease_lost"


class OperatorError(TandemError):
    code = "configuration"
