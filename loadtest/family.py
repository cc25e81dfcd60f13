"""One server and every process that it starts, on its cores; all of them ended when it is left."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

STOP_S = 45.0
"""Longest wait for a server that was told to end; what is left of it then is killed."""
MARK = "LOADTEST_FAMILY"
"""In the environment of every process of a family: who has lost its parent and left its group is found by it."""
_TAIL = 25
_PIN = "import os, sys; os.sched_setaffinity(0, map(int, sys.argv[1].split(','))); os.execv(sys.argv[2], sys.argv[2:])"
# Reads the server's pid, then waits: a newline means "stopped in order", end of file means "the parent is gone".
_WATCHER = """
read pid; read _ && exit
kill -s TERM "$pid"
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do kill -0 "$pid" && sleep 1; done 2>/dev/null
kill -s KILL -- "-$pid" 2>/dev/null
"""


class Family:
    """Owns: the process of `command`, its group, every process that descends from it, and its log file.

    A context manager: on leaving, however that comes, the first process is told to stop (SIGTERM) and what is left of
    the family is killed, by pid. The group keeps the terminal's Ctrl-C from it. If this process itself is killed, a
    watcher tells the first process to stop and then kills its group.
    """

    def __init__(self, command: Sequence[str], *, log: Path, environ: Mapping[str, str], cores: Sequence[int]) -> None:
        """`environ` is the whole environment. The first process is pinned to `cores` before it runs, so that all that
        descend from it are."""
        self.log = log
        self._mark = secrets.token_hex(16)
        self._environ = {**environ, MARK: self._mark}
        # macOS has no affinity: there nothing is pinned.
        pin = [sys.executable, "-ISc", _PIN, ",".join(map(str, cores))] if hasattr(os, "sched_setaffinity") else []
        self._command = [*pin, *command]
        self._first: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._first = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environ,
                cwd=self.log.parent,
                start_new_session=True,
            )
        self._watcher = subprocess.Popen(["/bin/sh", "-c", _WATCHER], stdin=subprocess.PIPE, start_new_session=True)
        self._tell_watcher(f"{self._first.pid}\n")
        self.root = psutil.Process(self._first.pid)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._first is not None
        family = self._descendants()
        with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
            self._first.terminate()
            self._first.wait(STOP_S)
        self._first.kill()
        _kill(family | self._ours())
        while late := self._ours():  # begun by one of them meanwhile
            _kill(late)
        self._first.wait()
        self._tell_watcher("\n")
        self._watcher.communicate()

    @property
    def code(self) -> int | None:
        """The exit code of the first process, None while it runs."""
        assert self._first is not None
        return self._first.poll()

    def last_words(self) -> str:
        """The end of the log."""
        lines = [line.rstrip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join(lines[-_TAIL:]) or "without a word"

    def _descendants(self) -> set[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return set(self.root.children(recursive=True))
        return set()

    def _ours(self) -> set[psutil.Process]:
        """Those alive that are in the group or the session of the first, or carry the mark."""
        return {process for process in psutil.process_iter() if self._is_ours(process)}

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            if self.root.pid in (os.getpgid(process.pid), os.getsid(process.pid)):
                return True
            return process.environ().get(MARK) == self._mark
        except (psutil.Error, OSError):
            return False

    def _tell_watcher(self, line: str) -> None:
        assert self._watcher.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._watcher.stdin.write(line.encode())
            self._watcher.stdin.flush()


def _kill(processes: set[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()  # by pid and start time: never somebody who has the pid by now
    psutil.wait_procs(processes, timeout=5.0)
