"""What a diffusion replica would claim next, by what it has in hand."""

from __future__ import annotations

from collections.abc import Callable

from serve.jobs.records import Want
from serve.models.denoiser import Denoiser
from serve.placements import Placement
from serve.relief import AGED_S, memory_mb

IDLE_WAIT_S = 1.0
"""After so long a replica that found nothing asks again, though no bell rang."""
LEFT_TO_OTHERS_S = 0.25
"""For so long a full replica leaves work to those that have a free row."""


def wants_of(placement: Placement, rows: int, batch: int) -> list[Want]:
    """What a replica with `rows` images in hand would claim, what it wants most first; `batch` images fill a step.

    Work that no smaller placement holds goes first, and smaller work fills in; but a steady stream of large work must
    not starve the small, whose own placements may be down. A batch that is full steps in turns, so beyond it there is
    more to take only where nobody else does: what has waited longer than an idle replica would have let it.
    """
    settings, model, smaller, most = placement.settings, placement.model, placement.smaller, placement.max_pixels
    batch = min(batch, settings.max_batch_size)
    if rows >= max(settings.max_rows, batch):
        return []
    wait_s = LEFT_TO_OTHERS_S if rows >= batch else 0.0
    memory = memory_mb(placement)
    if not smaller:
        return [Want(model, 0, most, wait_s, memory)]
    bounds = ((0, most, AGED_S), (smaller, most, wait_s), (0, smaller, wait_s))
    return [Want(model, *each, memory) for each in bounds]


def batch_of(denoiser: Denoiser, lanes: Callable[[tuple[int, int]], int]) -> int:
    """How many images, ordered as most are, fill a step: of the model's own size, guided where that is its default.

    `lanes` says the most batch entries of a step for latents of a (height, width); a guided image takes two.
    """
    factor = denoiser.vae_scale_factor
    guided = denoiser.guidance == "classifier_free" and denoiser.default_guidance_scale > 1
    most = lanes((denoiser.default_height // factor, denoiser.default_width // factor))
    return max(1, most // 2 if guided else most)
