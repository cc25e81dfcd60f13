"""What every baseline has in common: the stock pipeline, a group drawn in one call, the file."""

from __future__ import annotations

import io
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from loadtest.baselines.order import Order
from serve.models import resolve
from serve.models.samplers import SAMPLERS
from serve.orders import MAX_SEED
from serve.settings.pools import ModelSettings

_NOT_LOADED = ("safety_checker", "feature_extractor")

T = TypeVar("T")


class Drawer:
    """diffusers' own pipeline of a diffusers folder, text encoder and all, on the CPU in float32 as Tandem's there.

    Owns: the pipeline, whose scheduler is changed for each call: one thread at a time.
    """

    def __init__(self, source: str, torch_threads: int | None) -> None:
        """`source` as Tandem's `model.source`; None leaves torch its own number of threads. OperatorError for a model
        that can't be served."""
        if torch_threads is not None:
            torch.set_num_threads(torch_threads)
        diffusers_logging.set_verbosity_error()  # of prompts that were cut, once for each
        transformers_logging.set_verbosity_error()
        model = resolve(ModelSettings(source=source), Path())
        if model.denoiser is None:
            raise ValueError(f"{source} draws nothing")
        index = DiffusionPipeline.load_config(model.path, local_files_only=True)
        absent = {part: None for part in _NOT_LOADED if part in index}
        self._pipeline: Any = DiffusionPipeline.from_pretrained(
            model.path, local_files_only=True, dtype=torch.float32, use_safetensors=True, **absent
        )
        self._pipeline.set_progress_bar_config(disable=True)
        for part in ("unet", "vae"):  # what diffusers' guide to speed says of convolutions
            if (module := getattr(self._pipeline, part, None)) is not None:
                module.to(memory_format=torch.channels_last)
        self._scheduler = self._pipeline.scheduler
        self._defaults = model.denoiser

    def draw(self, orders: Sequence[Order]) -> list[Image.Image]:
        """The orders' pictures. A call of the pipeline has one step count, guidance, size and sampler: orders that are
        equal in these share a call, and the calls follow one another."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, order in enumerate(orders):
            groups.setdefault(self._shared(order), []).append(index)
        drawn: dict[int, Image.Image] = {}
        for shared, members in groups.items():
            drawn |= zip(members, self._call([orders[index] for index in members], *shared), strict=True)
        return [drawn[index] for index in range(len(orders))]

    def _shared(self, order: Order) -> tuple[int, float, int, int, str | None]:
        given, known = order, self._defaults
        return (
            _or(given.num_inference_steps, known.default_num_inference_steps),
            _or(given.guidance_scale, known.default_guidance_scale),
            _or(given.width, known.default_width),
            _or(given.height, known.default_height),
            given.scheduler,
        )

    def _call(
        self, orders: Sequence[Order], steps: int, guidance: float, width: int, height: int, sampler: str | None
    ) -> list[Image.Image]:
        self._pipeline.scheduler = self._sampler(sampler)
        seeds = [secrets.randbelow(MAX_SEED + 1) if order.seed is None else order.seed for order in orders]
        images: list[Image.Image] = self._pipeline(
            prompt=[order.prompt for order in orders],
            negative_prompt=[order.negative_prompt for order in orders],
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=width,
            height=height,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images
        return images

    def _sampler(self, name: str | None) -> Any:
        if name is None:
            return self._scheduler
        sampler = SAMPLERS[name]
        return getattr(diffusers, sampler.cls).from_config(self._scheduler.config, **sampler.options)


def png(image: Image.Image) -> bytes:
    """As Tandem compresses it: Pillow's default."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
