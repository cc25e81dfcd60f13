"""Images in a folder of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
from pathlib import Path

from serve.errors import BackendUnavailable, JobNotFound, OperatorError
from serve.results.keys import checked

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0
_TEMPORARY = ".tmp"
_ATTEMPTS = 8
"""Times that a file is written whose folder deletions of other images take away meanwhile."""


class LocalStore:
    """Files under `folder`. A reader sees a whole image or none: the bytes reach the disk under another name first.

    Owns: the files in `folder`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def put(self, key: str, data: bytes, content_type: str) -> None:
        await asyncio.to_thread(self._put, self._folder / checked(key), data)

    async def get(self, key: str) -> bytes:
        try:
            return await asyncio.to_thread((self._folder / checked(key)).read_bytes)
        except FileNotFoundError:
            raise JobNotFound("the image is gone; its time is over", "index") from None
        except OSError as error:
            raise self._away("read", error) from None

    async def delete(self, key: str) -> None:
        try:
            await asyncio.to_thread(_delete, self._folder / checked(key))
        except OSError as error:
            raise self._away("delete", error) from None

    def url(self, key: str) -> None:
        return None

    async def check(self) -> None:
        try:
            await asyncio.to_thread(self._write, self._folder / "writable", b"")
        except OSError as error:
            raise OperatorError(f"data_dir: {self._folder} can't be written: {error.strerror}", "data_dir") from None

    def _put(self, path: Path, data: bytes) -> None:
        try:
            for _ in range(_ATTEMPTS - 1):
                # A deletion took the job's folder away; the latter where it was there and gone again.
                with contextlib.suppress(FileNotFoundError, FileExistsError):
                    return self._write(path, data)
            self._write(path, data)
        except OSError as error:
            raise self._away("write", error) from None

    def _write(self, path: Path, data: bytes) -> None:
        """After this the file survives a power cut, whole. A crash in between leaves a temporary file only."""
        made = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_TEMPORARY}")
        try:
            with temporary.open("xb") as file:
                with contextlib.suppress(OSError):  # a file system without locks: no deletion gets one either
                    fcntl.flock(file, fcntl.LOCK_EX)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        with contextlib.suppress(FileNotFoundError):  # it was there, and has been deleted since
            _sync(path.parent)
            if made:
                _sync(path.parent.parent)

    def _away(self, verb: str, error: OSError) -> BackendUnavailable:
        log.warning("can't %s under %s: %s", verb, self._folder, error.strerror)
        return BackendUnavailable(f"the result store can't {verb} images", "data_dir", _RETRY_AFTER_S)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):  # another deletion took the folder away in between
        for temporary in path.parent.glob(f".{path.name}.*{_TEMPORARY}"):
            _remove_if_left(temporary)
    with contextlib.suppress(OSError):  # it still holds other images
        path.parent.rmdir()


def _remove_if_left(temporary: Path) -> None:
    """By a writer that is no more: a living one holds the file's lock, or writes again what was taken before."""
    with contextlib.suppress(OSError), temporary.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary.unlink(missing_ok=True)
