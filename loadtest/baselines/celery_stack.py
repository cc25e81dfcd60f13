"""The Celery design, whole: Redis, one worker, the API; as `docker compose up` starts them for its users."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from loadtest.baselines.order import options
from serve.embedded import EmbeddedRedis

_STOP_S = 10.0
_WATCH_S = 0.2
_PACKAGE = "loadtest.baselines"


def main() -> int:
    """0 when told to end; 1 when a part has ended by itself."""
    arguments = options(__doc__).parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="celery-")))
        # The kind that keeps nothing on a disk; without a limit it evicts nothing.
        broker = stack.enter_context(EmbeddedRedis(folder, "cache"))
        (folder / "outputs").mkdir()
        environ = _environment(broker.url, folder / "outputs", arguments)
        worker = ["celery", "--app", f"{_PACKAGE}.celery_app", "worker", "--pool", "solo", "--concurrency", "1"]
        worker += ["--loglevel", "WARNING", "--without-gossip", "--without-mingle"]
        api = ["uvicorn", f"{_PACKAGE}.celery_api:app", "--host", "127.0.0.1", "--port", str(arguments.port)]
        api += ["--log-level", "warning", "--no-access-log", "--timeout-graceful-shutdown", "5"]
        parts = [stack.enter_context(_running(command, environ)) for command in (worker, api)]
        while all(part.poll() is None for part in parts) and broker.alive:
            time.sleep(_WATCH_S)
        return 1
    return 0


@contextlib.contextmanager
def _running(module: Sequence[str], environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A module of Python's as a process, ended when this is left; in a session of its own, so that Ctrl-C ends it
    once."""
    process = subprocess.Popen([sys.executable, "-m", *module], env=environ, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _environment(redis_url: str, outputs: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """What `CelerySettings` reads."""
    known = {
        "IMAGEN_REDIS_URL": redis_url,
        "IMAGEN_OUTPUTS": str(outputs),
        "IMAGEN_MODEL": arguments.model,
        "IMAGEN_MAX_QUEUE_SIZE": str(arguments.max_waiting),
    }
    if arguments.torch_threads is not None:
        known["IMAGEN_TORCH_THREADS"] = str(arguments.torch_threads)
    return {**os.environ, **known}


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
