"""The pictures that jobs start from: read from an order, checked, and stored before the job is logged."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from serve.domain.orders import ImageRequest, ResizeMode
from serve.errors import BackendUnavailable, JobNotFound
from serve.images import Upload, cut_out_png, image_png, inspect, mask_png, viewed_png, written_file
from serve.jobs.store import JobStore
from serve.orders import NewImage
from serve.results.keys import input_key, split
from serve.results.store import ResultStore
from serve.settings.orders import LimitSettings
from serve.starting import Given

DECODINGS = 2
"""Files that one process reads or decodes at a time, which bounds the memory and the cores that they take."""
PNG = "image/png"
_NONCE_BYTES = 4

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pictures:
    """What one submission of a job starts from. The nonce keeps apart what two submissions under one id store: each may
    delete its own. `mode` is how they come to the job's size, unless they are kept `whole`, in their own; `mask_invert`
    has the mask's black repainted."""

    job_id: str
    uploads: Sequence[Upload]
    mode: ResizeMode = ResizeMode.STRETCH
    mask_invert: bool = False
    whole: bool = False
    nonce: str = field(default_factory=lambda: secrets.token_hex(_NONCE_BYTES))

    @property
    def keys(self) -> Mapping[str, str]:
        """Of the result store, by field."""
        return {each.field: input_key(self.job_id, each.field, self.nonce) for each in self.uploads}

    @property
    def given(self) -> Mapping[str, Given]:
        """By field, what `complete` wants to know of them."""
        keys = self.keys
        return {each.field: Given(keys[each.field], each.width, each.height) for each in self.uploads}

    def belong_to(self, request: ImageRequest) -> bool:
        """Whether it is these that the logged request names."""
        return any(key in (request.image, request.mask) for key in self.keys.values())


class Inputs:
    """Reads what an order's `image` and `mask` hold or name, and stores it for the job.

    Owns: the stored pictures until the job is logged.
    """

    def __init__(self, jobs: JobStore, results: ResultStore, limits: LimitSettings) -> None:
        self._jobs = jobs
        self._results = results
        self._limits = limits
        self._decoding = asyncio.Semaphore(DECODINGS)

    async def read(self, new: NewImage, owner: str) -> Sequence[Upload]:
        """The files of the order, their headers checked. Raises InvalidRequest, or JobNotFound where one that the order
        names is gone or another owner's; both name the field."""
        texts = (("image", new.image), ("mask", new.mask))
        return [await self._upload(name, text, owner) for name, text in texts if text is not None]

    async def cut_out(self, field: str, text: str, owner: str) -> bytes | None:
        """A mask, as a PNG: what is transparent in the picture that the text holds or names. None where nothing is.
        Raises as `read` does."""
        upload = await self._upload(field, text, owner)
        return await self._worked(cut_out_png, upload)

    async def picture(self, field: str, text: str, owner: str, most: int) -> bytes:
        """For a model to look at: the picture that the text holds or names, as an RGB PNG of at most `most` pixels a
        side. Raises as `read` does."""
        return await self._worked(viewed_png, await self._upload(field, text, owner), most)

    async def key(self, job_id: str, name: str, owner: str) -> str:
        """Of a picture of an owner's job, in the result store. JobNotFound where the job has none of that name."""
        job = await self._jobs.get(job_id, owner)
        if name.isdecimal():
            key = next((ref.key for ref in job.images if ref.index == int(name)), None)
        else:
            key = {"image": job.request.image, "mask": job.request.mask}.get(name)
        if key is None:
            raise JobNotFound(f"job {job_id} is {job.state} and has no image {name}", "index")
        return key

    async def _upload(self, name: str, text: str, owner: str) -> Upload:
        """The file that an order's field of that name holds or names, its header checked."""
        if place := split(text):
            try:
                data = await self._results.get(await self.key(*place, owner))
            except JobNotFound as error:
                raise JobNotFound(f"{name}: {error.message}", name) from None
        else:
            data = await self._worked(written_file, name, text, self._limits)
        return await self._worked(inspect, name, data, self._limits)

    async def _worked(self, work: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """In a thread, which whoever goes away can't stop: until it has ended, it counts."""
        async with self._decoding:
            return await settled(asyncio.to_thread(work, *arguments, **options))

    async def keep(self, pictures: Pictures, width: int, height: int) -> None:
        """Store them at that size; where this fails or is cancelled, they are deleted again. Raises InvalidRequest for
        a file that is broken, BackendUnavailable."""
        try:
            for upload in pictures.uploads:
                data = await self._decoded(pictures, upload, width, height)
                await settled(self._results.put(pictures.keys[upload.field], data, PNG))
        except BaseException:
            await settled(self.discard(pictures))
            raise

    async def discard(self, pictures: Pictures) -> None:
        """What can't be deleted now goes with the job's record, if there is one."""
        for key in pictures.keys.values():
            with contextlib.suppress(BackendUnavailable):
                await self._results.delete(key)

    async def _decoded(self, pictures: Pictures, upload: Upload, width: int, height: int) -> bytes:
        if pictures.whole:
            width, height = upload.width, upload.height
        if upload.field == "mask":
            return await self._worked(mask_png, upload, width, height, pictures.mode, invert=pictures.mask_invert)
        return await self._worked(image_png, upload, width, height, pictures.mode)


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
