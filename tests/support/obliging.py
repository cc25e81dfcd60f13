"""A worker without a model: whatever is ordered, it answers at once with pictures of the ordered kind and size."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from PIL import Image
from support.jobs import ANY

from serve.domain.jobs import ImageRef, Preview, Timings
from serve.errors import BackendUnavailable, LeaseLost
from serve.jobs.store import Claim, JobStore
from serve.results.encode import encode_image
from serve.results.png import parameters
from serve.results.store import ResultStore


@contextlib.asynccontextmanager
async def obliging(jobs: JobStore, results: ResultStore) -> AsyncIterator[None]:
    """Meanwhile no job stays queued."""
    working = asyncio.create_task(_work(jobs, results))
    try:
        yield
        assert not working.done(), working.result()
    finally:
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working


async def _work(jobs: JobStore, results: ResultStore) -> None:
    while True:
        # The client has gone, or the machine is busy and its Redis slow.
        with contextlib.suppress(LeaseLost, BackendUnavailable):
            claim = await jobs.claim("obliging", ANY)
            if isinstance(claim, Claim):
                await _draw(claim, jobs, results)
            else:
                await jobs.wait_for_work("obliging", 1.0)


async def _draw(claim: Claim, jobs: JobStore, results: ResultStore) -> None:
    request, refs = claim.request, []
    if not await jobs.renew(claim, 1):
        await jobs.cancelled(claim)
        return
    picture = Image.new("RGB", (request.width, request.height), "red")
    for index in range(request.num_images):
        if request.preview_every:
            await jobs.preview(claim, Preview("a run", index, 1, request.num_inference_steps, b"\xff\xd8\xff"))
        data, kind, extension = encode_image(picture, request, parameters(request, index))
        key = f"{claim.job_id}/{index}.{extension}"
        await results.put(key, data, kind)
        refs.append(
            ImageRef(
                index=index,
                key=key,
                seed=request.seed_of(index),
                width=request.width,
                height=request.height,
                content_type=kind,
                bytes=len(data),
            )
        )
    await jobs.succeed(claim, images=refs, cache={}, timings=Timings(steps_s=0.001))
