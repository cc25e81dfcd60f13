"""What is sent and what came of it: the frozen messages between the rooms of `loadtest`."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request of a trace. `due_s` is when it is to be sent, seconds after the start; a closed loop passes over it.

    `dialect` is a name in `loadtest.sender.users.DIALECTS`. `body` is the order as the native dialect writes it.
    `hang_up_s`: the client leaves after so many seconds; None for one that waits. `user` is who sends it, where they
    are told apart.
    """

    index: int
    due_s: float
    dialect: str
    body: Mapping[str, Any]
    hang_up_s: float | None = None
    user: str = ""


class Outcome(enum.StrEnum):
    """`refused`: 429 or 503, told to come again. `invalid`: any other 4xx. `failed`: the job failed, or another 5xx.
    `late`: not answered within the time that the client gives. `left`: the client hung up as planned. `broken`: the
    connection."""

    DONE = "done"
    REFUSED = "refused"
    INVALID = "invalid"
    FAILED = "failed"
    LATE = "late"
    LEFT = "left"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request's fate. Times are seconds after the start of the run, on the sender's clock.

    `ended_s` is when the client had what it came for: the picture, the embeddings, or the refusal. `status` is the last
    HTTP status, 0 without any answer. `bytes` are those of the pictures. `job` is the ended job as the server told it
    (`timings`, `cache`, `attempt`, `request`), where the dialect tells it. `hangs_up`: the client was to leave early,
    whether it came to that or not.
    """

    index: int
    dialect: str
    due_s: float
    sent_s: float
    ended_s: float
    outcome: Outcome
    status: int
    detail: str = ""
    bytes: int = 0
    job: Mapping[str, Any] | None = None
    hangs_up: bool = False

    @property
    def latency_s(self) -> float:
        """From the intended send time: a client that was late to send hides nothing
        (https://www.infoq.com/presentations/latency-response-time/)."""
        return self.ended_s - self.due_s
