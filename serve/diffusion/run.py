"""One request on its way through the step loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from serve.diffusion.scheduler import Row
from serve.domain import ImageRequest, Preview, Schedule, StepEvent
from serve.errors import GenerationFailed, TandemError

log = logging.getLogger(__name__)

OnStep = Callable[[StepEvent], None]
OnPreview = Callable[[Preview], None]
Picture = Image.Image | npt.NDArray[np.uint16]
"""A finished image: RGB of 8 bits; of 16, where the request's `bit_depth` is that, as an array (height, width, 3)."""


@dataclass(frozen=True, slots=True)
class Work:
    """A request that is ready to be drawn. `run_id` names this attempt: two attempts at one job are two runs.

    `image` (RGB) and `mask` (L, white is repainted) are those of the request, of exactly its size.
    """

    run_id: str
    request: ImageRequest
    schedule: Schedule
    image: Image.Image | None = None
    mask: Image.Image | None = None


@dataclass(frozen=True, slots=True)
class Rendered:
    """The images in order, and what kept them from being exact (`step_cache`, `tiny_vae`, `tiled_vae`).

    `denoise_s` is the time from joining the step loop to the last image's last step, the steps of others in between
    included. `decode_s` is the time that the VAE's thread worked on this run, encoding of a source included and
    previews not; the waiting for that thread is in neither.
    """

    images: tuple[Picture, ...]
    denoise_s: float
    decode_s: float
    approximate: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class Run:
    """What the engine knows of a run in hand; only the loop's thread writes to it, but for `previewing`.

    `released` are the images whose steps are all made; `previewing` is whether previews of it wait or are being made.
    """

    work: Work
    rows: Sequence[Row]
    on_step: OnStep
    on_preview: OnPreview | None
    future: Future[Rendered]
    joined_at: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0
    released: set[int] = field(default_factory=set)
    images: dict[int, Picture] = field(default_factory=dict)
    approximate: set[str] = field(default_factory=set)
    previewing: bool = False

    @property
    def id(self) -> str:
        return self.work.run_id

    @property
    def complete(self) -> bool:
        return len(self.images) == len(self.rows)

    def wants_preview(self, event: StepEvent) -> bool:
        """None of the last step, which the image follows; none while the last previews still wait."""
        every = self.work.request.preview_every
        due = every > 0 and event.step % every == 0 and event.step < event.steps
        return due and self.on_preview is not None and not self.previewing

    def rendered(self) -> Rendered:
        images = tuple(self.images[index] for index in sorted(self.images))
        return Rendered(images, self.denoise_s, self.decode_s, tuple(sorted(self.approximate)))


def public(error: Exception) -> TandemError:
    """What a run's future may tell of an error: one that is nobody's is logged, and told without its text."""
    if isinstance(error, TandemError):
        return error
    log.error("a run failed in the step loop", exc_info=error)
    return GenerationFailed("the denoiser failed on this request")
