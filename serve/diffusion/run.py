"""One request on its way through the step loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image

from serve.diffusion.scheduler import LatentShape, Row
from serve.domain import ImageRequest, Preview, Schedule, StepEvent

OnStep = Callable[[StepEvent], None]
OnPreview = Callable[[Preview], None]


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
    """The images in order, and what kept them from being exact (`step_cache`, `tiny_vae`).

    `denoise_s` is the time from joining the step loop to the last image's last step, the steps of others in between
    included. `decode_s` is the time that the VAE's thread worked on this run, encoding of a source included and
    previews not; the waiting for that thread is in neither.
    """

    images: tuple[Image.Image, ...]
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
    images: dict[int, Image.Image] = field(default_factory=dict)
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


@dataclass(slots=True)
class Measurement:
    """Synthetic steps that were asked for, and the seconds of those that were made."""

    shape: LatentShape
    lanes: int
    steps: int
    future: Future[list[float]]
    seconds: list[float] = field(default_factory=list)
