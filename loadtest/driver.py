"""Sending a trace from a process of its own, so that every server meets the same client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from loadtest.samples import Arrival, Outcome, Sample
from serve.cli.extras import want
from serve.errors import OperatorError

_CHECK_S = 30.0
_LINE_BYTES = 1 << 24
"""Most of one sample: it has the whole job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A run so far, `elapsed_s` after its start, which was at `started_at` in Unix seconds. `p50_s` is the median
    latency of the latest answers; None before the first."""

    started_at: float
    elapsed_s: float
    sent: int
    done: int
    refused: int
    failed: int
    under_way: int
    p50_s: float | None


async def drive(
    target: str,
    arrivals: Sequence[Arrival],
    *,
    users: int | None = None,
    give_up_s: float = 60.0,
    key: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    until_s: float | None = None,
    into: list[Sample] | None = None,
) -> list[Sample]:
    """Send the trace and return what came of each request, by index; never more than the trace.

    An open loop sends each at its due time, whatever is under way. A closed one (`users`) keeps so many under way, in
    order, and begins none after `until_s`. Samples are appended to `into` as they come, for a run that is cut short.
    Raises OperatorError for a target that does not answer, without Locust, and where the process that sends ends
    before its time.
    """
    want("locust")
    await check_target(target)
    samples: list[Sample] = [] if into is None else into
    plan = {"target": target, "key": key, "users": users, "give_up_s": give_up_s, "until_s": until_s}
    with tempfile.TemporaryDirectory(prefix="tandem-loadtest-") as folder:
        trace, words = Path(folder, "trace"), Path(folder, "stderr")
        await asyncio.to_thread(_write, trace, plan, arrivals)
        async with _child(trace, words) as child:
            if not await _read(child, samples, on_progress):
                raise OperatorError(f"the load's process ended ({_end(await child.wait())}): {_last_line(words)}")
    return sorted(samples, key=lambda sample: sample.index)


def _write(trace: Path, plan: Mapping[str, Any], arrivals: Sequence[Arrival]) -> None:
    with trace.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in (plan, *map(asdict, arrivals)))


async def check_target(target: str) -> None:
    """Raises OperatorError where no server answers, or one that says of itself that it is not ready."""
    try:
        async with httpx.AsyncClient(timeout=_CHECK_S, trust_env=False, verify=ssl.create_default_context()) as http:
            answer = await http.get(f"{target.rstrip('/')}/readyz")
    except (httpx.TransportError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise OperatorError(
            f"--target: no server answers at {target} ({error or type(error).__name__})", "target"
        ) from None
    if answer.status_code == 503:  # servers of other kinds have no such page, which is no fault
        raise OperatorError(f"--target: the server at {target} is not ready", "target")


@asynccontextmanager
async def _child(trace: Path, words: Path) -> AsyncGenerator[asyncio.subprocess.Process]:
    """In a group of its own: a Ctrl-C is the parent's to hear. It is ended in any case, and ends itself when the pipe
    to it does."""
    with words.open("wb") as stderr:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loadtest.sender.process", str(trace)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            limit=_LINE_BYTES,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def _read(
    child: asyncio.subprocess.Process, samples: list[Sample], on_progress: Callable[[Progress], None] | None
) -> bool:
    """Whether it came to its end."""
    assert child.stdout is not None
    async for line in child.stdout:
        told: dict[str, Any] = json.loads(line)
        if "sample" in told:
            sample = told["sample"]
            samples.append(Sample(**sample | {"outcome": Outcome(sample["outcome"])}))
        elif "progress" in told and on_progress is not None:
            on_progress(Progress(**told["progress"]))
        elif "ended" in told:
            return True
    return False


def _end(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _last_line(words: Path) -> str:
    lines = [line.strip() for line in words.read_text(errors="replace").splitlines() if line.strip()]
    return (lines or ["without a word"])[-1]
