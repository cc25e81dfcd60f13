"""A claimed job's pictures and the result store: what it starts from, and what was drawn."""

from __future__ import annotations

import asyncio
import io
from functools import partial

from PIL import Image

from serve.diffusion.engine import Rendered
from serve.domain import ImageRef
from serve.errors import GenerationFailed, JobNotFound
from serve.jobs.store import Claim
from serve.patience import Patience
from serve.results.encode import encode_image
from serve.results.png import parameters
from serve.results.store import ResultStore


async def fetch_input(results: ResultStore, field: str, key: str | None, patience: Patience) -> Image.Image | None:
    """A picture that the job starts from, as the service stored it; None where the job has none.

    GenerationFailed where it is not in this replica's store: the client sent it, so another attempt may find it.
    """
    if key is None:
        return None
    try:
        data = await patience.repeat(lambda: results.get(key))
    except JobNotFound:
        raise GenerationFailed(
            f"the server no longer has the {field} that the job starts from: it was deleted, or the replica that drew "
            "keeps its files elsewhere"
        ) from None
    return await asyncio.to_thread(_decoded, data)


async def store_images(
    results: ResultStore, claim: Claim, rendered: Rendered, patience: Patience
) -> tuple[ImageRef, ...]:
    """Put every image; a later attempt of the same job writes the same bytes under the same keys."""
    request, refs = claim.request, []
    for index, image in enumerate(rendered.images):
        patience.wanted()
        known = parameters(request, index, rendered.approximate)
        data, content_type, extension = await asyncio.to_thread(encode_image, image, request, known)
        key = f"{claim.job_id}/{index}.{extension}"
        await patience.repeat(partial(results.put, key, data, content_type))
        refs.append(
            ImageRef(
                index=index,
                key=key,
                seed=request.seed + index,
                width=request.width,
                height=request.height,
                content_type=content_type,
                bytes=len(data),
            )
        )
    return tuple(refs)


def _decoded(data: bytes) -> Image.Image:
    """A PNG that this server wrote itself."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.load()
        return image
