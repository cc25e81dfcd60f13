"""The pictures that jobs start from: read from an order, checked, and stored before the job is logged."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from serve.errors import BackendUnavailable, JobNotFound
from serve.images import Upload, image_png, inspect, mask_png, written_file
from serve.jobs.store import JobStore
from serve.orders import Given, NewImage
from serve.results.keys import input_key, split
from serve.results.store import ResultStore
from serve.settings import LimitSettings

DECODINGS = 2
"""Files that one process reads or decodes at a time, which bounds the memory and the cores that they take."""
PNG = "image/png"

_NO_JOB = "there is no such job, or its record's time is over"
T = TypeVar("T")


class Inputs:
    """Reads what an order's `image` and `mask` hold or name, and stores it for the job.

    Owns: the stored pictures until the job is logged.
    """

    def __init__(self, jobs: JobStore, results: ResultStore, limits: LimitSettings) -> None:
        self._jobs = jobs
        self._results = results
        self._limits = limits
        self._decoding = asyncio.Semaphore(DECODINGS)

    async def read(self, new: NewImage) -> Sequence[Upload]:
        """The files of the order, their headers checked. Raises InvalidRequest, or JobNotFound where one that the order
        names is gone or another tenant's; both name the field."""
        texts = (("image", new.image), ("mask", new.mask))
        return [await self._upload(field, text, new.salt) for field, text in texts if text is not None]

    async def key(self, job_id: str, name: str, salt: str | None = None) -> str:
        """Of a picture of a job, in the result store. JobNotFound where the job has none of that name; with a `salt`,
        another tenant's job is one that there is not."""
        job = await self._jobs.get(job_id)
        if salt is not None and job.request.salt != salt:
            raise JobNotFound(_NO_JOB, "id")  # as of one that never was
        if name.isdecimal():
            key = next((ref.key for ref in job.images if ref.index == int(name)), None)
        else:
            key = {"image": job.request.image, "mask": job.request.mask}.get(name)
        if key is None:
            raise JobNotFound(f"job {job_id} is {job.state} and has no image {name}", "index")
        return key

    async def _upload(self, field: str, text: str, salt: str) -> Upload:
        """The file that an order's `field` holds or names, its header checked."""
        if place := split(text):
            try:
                data = await self._results.get(await self.key(*place, salt))
            except JobNotFound as error:
                raise JobNotFound(f"{field}: {error.message}", field) from None
        else:
            data = await self._worked(written_file, field, text, self._limits)
        return await self._worked(inspect, field, data, self._limits)

    async def _worked(self, work: Callable[..., T], *arguments: Any) -> T:
        """In a thread, which whoever goes away can't stop: until it has ended, it counts."""
        async with self._decoding:
            return await settled(asyncio.to_thread(work, *arguments))

    @contextlib.asynccontextmanager
    async def kept(self, job_id: str, uploads: Sequence[Upload], width: int, height: int) -> AsyncGenerator[None]:
        """Store them at that size; where this or the block fails or is cancelled, they are deleted again.

        A job whose submission failed may be queued all the same (its answer was lost), and then fails without them:
        nobody knows its id. Raises InvalidRequest for a file that is broken, BackendUnavailable.
        """
        keys = {upload.field: input_key(job_id, upload.field) for upload in uploads}
        try:
            for upload in uploads:
                make = mask_png if upload.field == "mask" else image_png
                data = await self._worked(make, upload, width, height)
                await settled(self._results.put(keys[upload.field], data, PNG))
            yield
        except BaseException:
            await settled(self._discard(keys.values()))
            raise

    async def _discard(self, keys: Iterable[str]) -> None:
        for key in keys:
            with contextlib.suppress(BackendUnavailable):
                await self._results.delete(key)


async def settled(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which a cancellation does not reach: that is raised when the work has ended. A thread can't
    be stopped, and what it still writes could not be deleted before."""
    task, cancelled = asyncio.create_task(work), False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        task.cancelled() or task.exception()  # nobody else will look
        raise asyncio.CancelledError
    return task.result()


def given(job_id: str, uploads: Sequence[Upload]) -> Mapping[str, Given]:
    """By field, what `complete` wants to know of them."""
    return {each.field: Given(input_key(job_id, each.field), each.width, each.height) for each in uploads}
