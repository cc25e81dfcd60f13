"""The bare engine, from outside: a process that draws, with nothing around it (`loadtest.bench.bare_process`)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import psutil

from serve.domain.orders import ImageRequest
from serve.errors import OperatorError
from serve.settings.tree import ENV_PREFIX

_PROCESS = "loadtest.bench.bare_process"
_END_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One order through the engine: seconds on one monotonic clock. `stages` are the engine's own, by name."""

    index: int
    sent_s: float
    ended_s: float
    stages: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return self.ended_s - self.sent_s


class Bare:
    """Owns: the process of one engine, and its log, a temporary file.

    A context manager: the process is ready when it is entered, and ended when it is left; it also ends by itself when
    its parent does. Methods block; one at a time.
    """

    def __init__(
        self, settings: Mapping[str, Any], *, data_dir: Path, cores: Sequence[int], prompts: Sequence[str]
    ) -> None:
        """`settings` are the server's, in groups; `data_dir` is its folder: the engine reads the step times that the
        replica found, so that both make batches of the same size. `prompts` are all texts that orders will have."""
        self._opening: dict[str, Any] = {
            "settings": {**settings, "data_dir": str(data_dir)},
            "cores": list(cores),
            "prompts": list(prompts),
        }
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        environ = {name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)}
        self._log: IO[bytes] = tempfile.TemporaryFile(prefix="tandem-bare-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", _PROCESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environ | {"HF_HUB_OFFLINE": "1"},
            start_new_session=True,
            text=True,
        )
        try:
            self._ask(self._opening)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        process = self._process
        assert process is not None
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            if process.stdin is not None:
                process.stdin.close()
            process.wait(_END_S)
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._log.close()

    @property
    def root(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def draw(self, order: ImageRequest) -> Drawn:
        """One order on the idle engine, from its submission to its future's result."""
        return _drawn(self._ask({"draw": asdict(order)})[0])

    def saturate(self, orders: Sequence[ImageRequest], users: int, in_hand: int) -> list[Drawn]:
        """All orders in turn, `users` always under way, at most `in_hand` of them given to the engine. `sent_s` is when
        a user came with it."""
        told = self._ask({"saturate": [asdict(order) for order in orders], "users": users, "in_hand": in_hand})
        return [_drawn(one) for one in told]

    def weights(self, orders: Sequence[ImageRequest]) -> list[float]:
        """Each order's share of a busy engine, seconds: its steps in the largest batches that pay, and its decoding."""
        return [float(weight) for weight in self._ask({"weigh": [asdict(order) for order in orders]})]

    def _ask(self, what: Mapping[str, Any]) -> Any:
        """Raises OperatorError with its last words when the process has ended."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise OperatorError(f"the bare engine ended: {self._last_words()}")
        return json.loads(line)

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "without a word"


def _drawn(told: Mapping[str, Any]) -> Drawn:
    return Drawn(**told)
