"""The last object of a job: what its images are. Where it is, they are all there, and the job needs no other run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

from serve.domain.jobs import ImageRef
from serve.domain.orders import ImageRequest
from serve.results.keys import checked


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What tells one order from another that has come to the same job id, in fields that stay as they are when a new
    version gives requests more of them."""

    model: str
    text_sha256: str
    seed: int
    num_images: int
    num_inference_steps: int
    width: int
    height: int
    output_format: str
    bit_depth: int

    @classmethod
    def of(cls, request: ImageRequest) -> Order:
        text = f"{request.prompt}\0{request.negative_prompt}"
        return cls(
            model=request.model,
            # A lone surrogate has no UTF-8.
            text_sha256=hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
            seed=request.seed,
            num_images=request.num_images,
            num_inference_steps=request.num_inference_steps,
            width=request.width,
            height=request.height,
            output_format=request.output_format,
            bit_depth=request.bit_depth,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One image as the store holds it. `sha256` is that of the file, in hexadecimal digits."""

    index: int
    key: str
    bytes: int
    sha256: str
    content_type: str
    seed: int
    width: int
    height: int

    @property
    def ref(self) -> ImageRef:
        return ImageRef(
            index=self.index,
            key=self.key,
            seed=self.seed,
            width=self.width,
            height=self.height,
            content_type=self.content_type,
            bytes=self.bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`attempt` and `fence` are those of the claim that wrote it; an image may be an earlier one's."""

    version: Literal[1] = 1
    attempt: int
    fence: int
    order: Order
    approximate: tuple[str, ...]
    images: tuple[Entry, ...]

    def written(self) -> bytes:
        return _MANIFEST.dump_json(self)


_MANIFEST = TypeAdapter(Manifest)


def read(data: bytes, job_id: str, num_images: int) -> Manifest | None:
    """The manifest of a job of so many images; None where it is damaged or not of that shape."""
    try:
        manifest = _MANIFEST.validate_json(data)
        of_the_job = all(checked(each.key).startswith(f"{job_id}/") for each in manifest.images)
    except ValueError:
        return None
    whole = [each.index for each in manifest.images] == list(range(num_images))
    return manifest if of_the_job and whole else None
