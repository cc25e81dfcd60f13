"""Images in a folder of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from serve.errors import BackendUnavailable, JobNotFound, OperatorError
from serve.results.keys import checked, checked_job
from serve.results.stored import Stored

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0
_TEMPORARY = ".tmp"
_ATTEMPTS = 8
"""Times that a file is written whose folder deletions of other images take away meanwhile."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
T = TypeVar("T")


class LocalStore:
    """Files under `folder`. A reader sees a whole image or none: the bytes reach the disk under another name first, and
    a hard link gives them theirs, which fails where the name is taken.

    On a file system without hard links the name is looked for before the file is renamed: two processes that put the
    same key at the same moment may then both take theirs for the first, and the later file stays.

    Owns: the files in `folder`.
    """

    kind = "local"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._renaming = threading.Lock()

    async def put(self, key: str, data: bytes, content_type: str) -> Stored:
        return await asyncio.to_thread(self._put, self._folder / checked(key), data)

    async def get(self, key: str) -> bytes:
        try:
            return await self._tried("read", (self._folder / checked(key)).read_bytes)
        except FileNotFoundError:
            raise JobNotFound("the image is gone; its time is over", "index") from None

    async def size(self, key: str) -> int | None:
        path = self._folder / checked(key)
        try:
            return await self._tried("read", lambda: path.stat().st_size)
        except FileNotFoundError:
            return None

    async def delete(self, key: str) -> None:
        path = self._folder / checked(key)
        await self._tried("delete", lambda: _delete(path))

    async def delete_job(self, job_id: str) -> None:
        folder = self._folder / checked_job(job_id)
        await self._tried("delete", lambda: _delete_folder(folder))

    def url(self, key: str) -> None:
        return None

    async def check(self) -> None:
        def write() -> None:
            folder = self._folder / f".{secrets.token_hex(8)}"  # no job's: an id has no dot
            folder.mkdir(parents=True)
            with _written(folder / "writable", b"writable"):
                pass

        try:
            await asyncio.to_thread(write)
        except OSError as error:
            raise OperatorError(f"data_dir: {self._folder} can't be written: {error.strerror}", "data_dir") from None

    async def _tried(self, verb: str, work: Callable[[], T]) -> T:
        """In a thread. FileNotFoundError passes, what else goes wrong is BackendUnavailable."""
        try:
            return await asyncio.to_thread(work)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._away(verb, error) from None

    def _put(self, path: Path, data: bytes) -> Stored:
        try:
            for _ in range(_ATTEMPTS - 1):
                # A deletion took the job's folder or the file away; the latter where it was there and gone again.
                with contextlib.suppress(FileNotFoundError, FileExistsError):
                    return self._write(path, data)
            return self._write(path, data)
        except OSError as error:
            raise self._away("write", error) from None

    def _write(self, path: Path, data: bytes) -> Stored:
        """After this the file survives a power cut, whole. A crash in between leaves a temporary file only."""
        made = not path.parent.exists()
        path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        stored = _there(path)
        if stored is None:
            with _written(path, data) as temporary:
                stored = Stored(len(data), True) if self._named(temporary, path) else _there(path)
        if stored is None:
            raise FileNotFoundError(errno.ENOENT, "deleted since", str(path))
        with contextlib.suppress(FileNotFoundError):  # it was there, and has been deleted since
            _sync(path.parent)  # the other writer may not have come to this yet
            if made:
                _sync(path.parent.parent)
        return stored

    def _named(self, temporary: Path, path: Path) -> bool:
        """Give the whole file its name. False where the name is taken."""
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with self._renaming:
                if path.exists():
                    return False
                temporary.replace(path)
        return True

    def _away(self, verb: str, error: OSError) -> BackendUnavailable:
        log.warning("can't %s under %s: %s", verb, self._folder, error.strerror)
        return BackendUnavailable(f"the result store can't {verb} images", "data_dir", _RETRY_AFTER_S)


@contextlib.contextmanager
def _written(path: Path, data: bytes) -> Iterator[Path]:
    """A file beside `path` with these bytes, on the disk. When the block ends it is gone; until then it is locked, so
    that no deletion takes it for a dead writer's."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_TEMPORARY}")
    with temporary.open("xb") as file:
        try:
            with contextlib.suppress(OSError):  # a file system without locks: no deletion gets one either
                fcntl.flock(file, fcntl.LOCK_EX)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # where the disk was full, or a deletion came to all but this file
                temporary.parent.rmdir()


def _there(path: Path) -> Stored | None:
    try:
        return Stored(path.stat().st_size, False)
    except FileNotFoundError:
        return None


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


def _delete_folder(folder: Path) -> None:
    """On the disk too when this returns: the job's record goes next, and nobody would look for its files again."""
    try:
        for path in folder.iterdir():
            if path.suffix == _TEMPORARY:
                _remove_if_left(path)
            else:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a writer is at it, whose file stays
            folder.rmdir()
        _sync(folder.parent)
    except FileNotFoundError:  # it never was, or another deletion was faster
        return


def _remove_if_left(temporary: Path) -> None:
    """By a writer that is no more: a living one holds the file's lock, or writes again what was taken before."""
    with contextlib.suppress(OSError), temporary.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary.unlink(missing_ok=True)
