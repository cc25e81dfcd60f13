"""One request on its way through the step loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from serve.diffusion.area import Area
from serve.diffusion.scheduler import Row
from serve.domain.conditioning import Schedule
from serve.domain.jobs import Preview, Relief, StepEvent
from serve.domain.orders import ImageRequest
from serve.errors import GenerationFailed, TandemError
from serve.rungs import Rung

log = logging.getLogger(__name__)

OnStep = Callable[[StepEvent], None]
OnPreview = Callable[[Preview], None]
OnRelief = Callable[[Relief], None]
Picture = Image.Image | npt.NDArray[np.uint16]
"""A finished image: RGB of 8 bits; of 16, where the request's `bit_depth` is that, as an array (height, width, 3)."""


@dataclass(frozen=True, slots=True)
class Work:
    """A request that is ready to be drawn. `run_id` names this attempt: two attempts at one job are two runs.

    `image` (RGB) and `mask` (L, white is repainted) are what is drawn over, of exactly the request's size. `area` is
    where they are from, where the request's own picture is larger and only a part of it is drawn.
    """

    run_id: str
    request: ImageRequest
    schedule: Schedule
    image: Image.Image | None = None
    mask: Image.Image | None = None
    area: Area | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Where a run's time went: seconds from `began_at` (it was submitted) to `ended_at` (its last image was taken),
    both on `time.monotonic`. The five stages follow one another and leave no gap; after the VAE's first part they are
    those of the image that made its last step last.

    `source_s` is waiting for the VAE's thread and encoding what the run starts from, 0 without; `batch_s` the time in
    the step loop but in no step, `steps_s` that in steps, which `batch_images` images shared on average; after the last
    step, `decode_s` is the time that the VAE decoded this run's images, `decode_wait_s` what that left.

    `vae_s` is no part of them: all that the VAE's thread worked on this run, whenever, previews not.
    """

    began_at: float
    ended_at: float
    source_s: float
    batch_s: float
    steps_s: float
    decode_wait_s: float
    decode_s: float
    batch_images: float
    vae_s: float


@dataclass(frozen=True, slots=True)
class Rendered:
    """The images in order, where the time went, and what kept the images from being exact (`step_cache`, `tiny_vae`,
    `tiled_vae`, `int8`, `int4`). `rung` is where the replica was on the memory ladder when the last of them was
    taken."""

    images: tuple[Picture, ...]
    spent: Spent
    approximate: tuple[str, ...] = ()
    rung: Rung = Rung.RESIDENT


@dataclass(slots=True, eq=False)
class Run:
    """What the engine knows of a run in hand; only the loop's thread writes to it, but for `previewing`.

    `released` are the images whose steps are all made; `previewing` is whether previews of it wait or are being made.
    The times ending in `_at` are `time.monotonic`'s: submitted, in the step loop, `last` out of it, the image that was
    released last. `stepped_s`, `shared` and `made` are by image: seconds in steps, the images of each of these summed,
    and their number. `decodings` are beginning and end of what the VAE did for it.
    """

    work: Work
    rows: Sequence[Row]
    on_step: OnStep
    on_preview: OnPreview | None
    on_relief: OnRelief
    future: Future[Rendered]
    began_at: float
    joined_at: float = 0.0
    released_at: float = 0.0
    last: int = 0
    stepped_s: list[float] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    decodings: list[tuple[float, float]] = field(default_factory=list)
    released: set[int] = field(default_factory=set)
    images: dict[int, Picture] = field(default_factory=dict)
    approximate: set[str] = field(default_factory=set)
    previewing: bool = False

    @property
    def id(self) -> str:
        return self.work.run_id

    def joins(self) -> None:
        """Its images are in the step loop from now on."""
        self.joined_at = time.monotonic()
        self.stepped_s = [0.0] * len(self.rows)
        self.shared = [0] * len(self.rows)
        self.made = [0] * len(self.rows)

    def releases(self, index: int) -> None:
        """Image `index` has made its last step."""
        self.released.add(index)
        self.released_at, self.last = time.monotonic(), index

    def stepped(self, index: int, took_s: float, images: int) -> None:
        """Image `index` was in a step of so many images."""
        self.stepped_s[index] += took_s
        self.shared[index] += images
        self.made[index] += 1

    @property
    def complete(self) -> bool:
        return len(self.images) == len(self.rows)

    def wants_preview(self, event: StepEvent) -> bool:
        """None of the last step, which the image follows; none while the last previews still wait."""
        every = self.work.request.preview_every
        due = every > 0 and event.step % every == 0 and event.step < event.steps
        return due and self.on_preview is not None and not self.previewing

    def rendered(self, rung: Rung) -> Rendered:
        images = tuple(self.images[index] for index in sorted(self.images))
        return Rendered(images, self._spent(time.monotonic()), tuple(sorted(self.approximate)), rung)

    def _spent(self, ended_at: float) -> Spent:
        steps_s = self.stepped_s[self.last]
        decode_s, at = 0.0, self.released_at
        for start, end in sorted(self.decodings):  # two overlap where one is tried again between two steps
            decode_s, at = decode_s + max(0.0, end - max(start, at)), max(at, end)
        return Spent(
            began_at=self.began_at,
            ended_at=ended_at,
            source_s=self.joined_at - self.began_at if self.work.image is not None else 0.0,
            batch_s=self.released_at - (self.began_at if self.work.image is None else self.joined_at) - steps_s,
            steps_s=steps_s,
            decode_wait_s=ended_at - self.released_at - decode_s,
            decode_s=decode_s,
            batch_images=self.shared[self.last] / max(1, self.made[self.last]),
            vae_s=sum(end - start for start, end in self.decodings),
        )


def public(error: Exception) -> TandemError:
    """What a run's future may tell of an error: one that is nobody's is logged, and told without its text."""
    if isinstance(error, TandemError):
        return error
    log.error("a run failed in the step loop", exc_info=error)
    return GenerationFailed("the denoiser failed on this request")
