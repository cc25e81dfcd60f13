"""A single-file checkpoint -> a diffusers folder, made once and kept."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from serve.errors import OperatorError
from serve.models.weight_files import NotHereYet, refused

_UNFINISHED = ".converting-"
_RECIPE = 2
"""Another way to convert needs another number: what is kept outlives a release."""


def converted(
    checkpoint: Path,
    config: str | None,
    data_dir: Path,
    check: Callable[[Path], object],
    *,
    here_only: bool = False,
) -> Path:
    """The diffusers folder made from `checkpoint` and the folder or hub id `config`, put in place by one rename.

    The conversion runs in a process of its own, so that torch and the checkpoint leave memory with it. Raises
    OperatorError; `check` raises it too, and then nothing is kept. With `here_only` what is not converted yet is
    NotHereYet.
    """
    models = data_dir.resolve() / "models"
    target = models / conversion_digest(checkpoint, config)
    if target.is_dir():
        return target
    if here_only:
        raise NotHereYet(f"model.source: {checkpoint} has to be converted first", "model.source")
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _alone(models):
            if not target.is_dir():
                with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=models, ignore_cleanup_errors=True) as work:
                    _convert(checkpoint, config, Path(work) / "model")
                    check(Path(work) / "model")
                    (Path(work) / "model").rename(target)
    except OSError as error:
        raise OperatorError(f"data_dir: {models} can't be written: {error.strerror}", "data_dir") from None
    return target


@contextmanager
def _alone(models: Path) -> Iterator[None]:
    """The replicas of one machine start together; one converts, the others wait. What a killed one left is removed."""
    with (models / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in models.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def conversion_digest(checkpoint: Path, config: str | None) -> str:
    """Names the conversion. Reading gigabytes on every start would cost seconds, so that length, time of change and
    the first bytes (which hold the header) stand for the weights; the configuration's files are read whole."""
    stat = checkpoint.stat()
    digest = hashlib.blake2b(f"{_RECIPE}\0{stat.st_size}\0{stat.st_mtime_ns}\0{config}\0".encode(), digest_size=16)
    with checkpoint.open("rb") as file:
        digest.update(file.read(1 << 20))
    folder = Path(config).expanduser() if config else None
    if folder and folder.is_dir():
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".txt") and path.is_file()):
            digest.update(
                f"\0{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes()
            )
    return digest.hexdigest()


def _convert(checkpoint: Path, config: str | None, out: Path) -> None:
    command = [sys.executable, "-m", "serve.diffusion.single_file", str(checkpoint), str(out)]
    if config is not None:
        folder = Path(config).expanduser()
        command.append(str(folder.resolve()) if folder.is_dir() else config)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines and done.returncode > 0 else f"the conversion ended with status {done.returncode}"
        raise refused(f"{checkpoint} can't be converted: {reason}")
