"""The pictures that jobs start from: read from an order, checked, and stored before the job is logged."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence

from serve.errors import BackendUnavailable, JobNotFound
from serve.images import Upload, image_png, inspect, mask_png, written_file
from serve.jobs.store import JobStore
from serve.orders import Given, NewImage
from serve.results.keys import input_key, split
from serve.results.store import ResultStore
from serve.settings import LimitSettings

DECODINGS = 2
"""Pictures that one process decodes at a time, which bounds the memory that they take."""
PNG = "image/png"


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
        names is gone; both name the field."""
        texts = (("image", new.image), ("mask", new.mask))
        return [await self._upload(field, text) for field, text in texts if text is not None]

    async def key(self, job_id: str, name: str) -> str:
        """Of a picture of a job, in the result store. JobNotFound where the job has none of that name."""
        job = await self._jobs.get(job_id)
        if name.isdecimal():
            key = next((ref.key for ref in job.images if ref.index == int(name)), None)
        else:
            key = {"image": job.request.image, "mask": job.request.mask}.get(name)
        if key is None:
            raise JobNotFound(f"job {job_id} is {job.state} and has no image {name}", "index")
        return key

    async def _upload(self, field: str, text: str) -> Upload:
        """The file that an order's `field` holds or names, its header checked."""
        if place := split(text):
            try:
                data = await self._results.get(await self.key(*place))
            except JobNotFound as error:
                raise JobNotFound(f"{field}: {error.message}", field) from None
        else:
            data = await asyncio.to_thread(written_file, field, text, self._limits)
        return await asyncio.to_thread(inspect, field, data, self._limits)

    @contextlib.asynccontextmanager
    async def kept(self, job_id: str, uploads: Sequence[Upload], width: int, height: int) -> AsyncGenerator[None]:
        """Store them at that size; where this or the block fails, they are deleted again.

        A job whose submission failed may be queued all the same (its answer was lost), and then fails without them:
        nobody knows its id. Raises InvalidRequest for a file that is broken, BackendUnavailable.
        """
        keys = {upload.field: input_key(job_id, upload.field) for upload in uploads}
        try:
            for upload in uploads:
                make = mask_png if upload.field == "mask" else image_png
                async with self._decoding:
                    data = await asyncio.to_thread(make, upload, width, height)
                await self._results.put(keys[upload.field], data, PNG)
            yield
        except BaseException:
            for key in keys.values():
                with contextlib.suppress(BackendUnavailable):
                    await self._results.delete(key)
            raise


def given(job_id: str, uploads: Sequence[Upload]) -> Mapping[str, Given]:
    """By field, what `complete` wants to know of them."""
    return {each.field: Given(input_key(job_id, each.field), each.width, each.height) for each in uploads}
