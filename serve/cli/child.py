"""A `tandem up` of one's own, for as long as a command needs it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from serve.errors import OperatorError

_STOP_S = 30.0
# Reads the server's pid, then waits: a newline means "stopped in order", end of file means "the parent is gone".
_WATCHER = """
read pid; read _ && exit
kill -s TERM "$pid"
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do kill -0 "$pid" && sleep 1; done 2>/dev/null
kill -s KILL -- "-$pid" 2>/dev/null
"""


class ChildServer:
    """Owns: the process of one `tandem up`, its process group and its log file.

    A context manager: on leaving, however that comes, the server is told to stop, then what is left of its group is
    killed. The group keeps the terminal's Ctrl-C from it: it is stopped once, in order, by its parent. If the parent
    itself is killed, a watcher does the same.
    """

    def __init__(self, arguments: Sequence[str], log: Path, environ: Mapping[str, str] | None = None) -> None:
        """`environ` is the server's whole environment; None hands down this process's own."""
        self.log = log
        self._environ = environ
        self._command = [sys.executable, "-m", "serve.cli", "up", *arguments]
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            log = self.log.open("wb")
        except OSError as error:
            raise OperatorError(f"data_dir: {self.log}: {error.strerror}", "data_dir") from None
        with log:
            self._server = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environ,
                start_new_session=True,
            )
        self._watcher = subprocess.Popen(["/bin/sh", "-c", _WATCHER], stdin=subprocess.PIPE, start_new_session=True)
        self._tell_watcher(f"{self._server.pid}\n")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._server is not None
        try:
            self._server.terminate()
            self._server.wait(_STOP_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._server.kill()
        # Ray's agents outlive a start that was cut short by a minute; they are in the server's group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()
        self._tell_watcher("\n")
        self._watcher.communicate()

    @property
    def alive(self) -> bool:
        return self._server is not None and self._server.poll() is None

    def check(self) -> None:
        """OperatorError with the server's own last line if it has ended by itself."""
        if not self.alive:
            raise OperatorError(f"the server ended: {self._last_words()} (log: {self.log})")

    def _tell_watcher(self, line: str) -> None:
        assert self._watcher.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._watcher.stdin.write(line.encode())
            self._watcher.stdin.flush()

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        own = [line.removeprefix("tandem: ") for line in lines if line.startswith("tandem: ")]
        return (own or lines or ["without a word"])[-1]
