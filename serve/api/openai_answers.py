"""What OpenAI's clients are answered: the pictures of a job, and what they are counted as."""

from __future__ import annotations

import asyncio
import base64
import math
from typing import Literal

from serve.api.fields import Schema
from serve.api.openai_orders import Answering
from serve.callers import Caller
from serve.domain.jobs import ImageRef, Job, Timings
from serve.domain.text import CacheReport, Note, Truncation
from serve.service import ImageService

SQUARE = 16
"""Pixels on each side of what counts as one token of a picture: what SD 3 and FLUX read as one."""


class InputTokens(Schema):
    text_tokens: int
    """Those that were read of the prompt and the negative one, each counted by the encoder that reads most of it."""
    image_tokens: int
    """Squares of 16 x 16 pixels of the picture that it starts from."""


class OutputTokens(Schema):
    image_tokens: int
    text_tokens: Literal[0] = 0


class Usage(Schema):
    """What the pictures are counted as."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    """Squares of 16 x 16 pixels of all pictures."""
    output_tokens_details: OutputTokens
    total_tokens: int


class Picture(Schema):
    """One picture: the file, or where it is."""

    b64_json: str | None = None
    url: str | None = None
    """From a store that signs addresses one that is good for a while; else `GET /v1/images/{id}/{index}`, which wants
    your key."""
    revised_prompt: str | None = None
    """The prompt as it was drawn, where a template or a random choice made it."""
    seed: int
    """Draws it again."""


class ImagesAnswer(Schema):
    """The pictures, by OpenAI's fields; `job` and what follows it are beside them."""

    created: int
    """When they were done, in Unix seconds."""
    background: Literal["opaque"] = "opaque"
    data: list[Picture]
    output_format: str
    quality: str
    size: str
    usage: Usage
    job: str
    """Its id, for `GET /v1/jobs/{id}`."""
    model: str
    seed: int
    """Of the first picture."""
    timings: Timings
    cache: CacheReport | None
    truncated: tuple[Truncation, ...]
    """Text that did not fit into the model's prompt and was left out."""
    notes: tuple[Note, ...]
    """What of the text was read otherwise than it was written."""
    approximate: tuple[str, ...]
    """What kept the pictures from being exact."""


async def answer_of(job: Job, answering: Answering, service: ImageService, caller: Caller, base: str) -> ImagesAnswer:
    """Of a job that has its pictures. `base` is the address at which the client reached this server."""
    if answering.url:
        told = [{"url": service.signed_url(ref) or f"{base}/v1/images/{job.id}/{ref.index}"} for ref in job.images]
    else:
        files = await asyncio.gather(*(file_of(job, ref, service, caller) for ref in job.images))
        told = [{"b64_json": file} for file in files]
    revised = revised_prompt(job, answering)
    return ImagesAnswer(
        created=made_at(job),
        data=[
            Picture(**each, revised_prompt=revised, seed=ref.seed) for each, ref in zip(told, job.images, strict=True)
        ],
        output_format=job.request.output_format,
        quality=answering.quality,
        size=size_of(job),
        usage=usage_of(job, len(job.images)),
        job=job.id,
        model=job.request.model,
        seed=job.request.seed,
        timings=job.timings,
        cache=job.cache,
        truncated=job.truncated,
        notes=job.notes,
        approximate=job.approximate,
    )


def usage_of(job: Job, pictures: int, *, given: bool = True) -> Usage:
    """Of so many of the job's pictures, and of what they were made from unless that is counted elsewhere."""
    request, read = job.request, dict[str, int]()
    for count in job.tokens:
        read[count.field] = max(read.get(count.field, 0), count.used)
    squares = math.ceil(request.width / SQUARE) * math.ceil(request.height / SQUARE)
    text = sum(read.values()) if given else 0
    image = squares if given and request.image is not None else 0
    return Usage(
        input_tokens=text + image,
        input_tokens_details=InputTokens(text_tokens=text, image_tokens=image),
        output_tokens=pictures * squares,
        output_tokens_details=OutputTokens(image_tokens=pictures * squares),
        total_tokens=text + image + pictures * squares,
    )


def made_at(job: Job) -> int:
    return int(job.finished_at or job.created_at)


def size_of(job: Job) -> str:
    return f"{job.request.width}x{job.request.height}"


def revised_prompt(job: Job, answering: Answering) -> str | None:
    """The prompt that was drawn, where it is not what was written."""
    return None if job.request.prompt == answering.prompt else job.request.prompt


async def file_of(job: Job, ref: ImageRef, service: ImageService, caller: Caller) -> str:
    """A picture in base64."""
    return base64.b64encode(await service.picture(job.id, str(ref.index), caller)).decode()
