"""What a user would run instead: diffusers' own pipeline, one request at a time."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from serve.domain.conditioning import Conditioning, Schedule
from serve.domain.orders import ImageRequest
from serve.encoders.export import conditioning_at
from serve.models import ModelFolder
from serve.models.samplers import SAMPLERS

_TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


class StockPipeline:
    """The pipeline of a diffusers folder without its text encoders: embeddings are given to it, as to Tandem's engine.

    Owns: the pipeline, and the one thread that runs it.
    """

    def __init__(self, model: ModelFolder, device: torch.device, dtype: torch.dtype) -> None:
        diffusers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()  # of image processors that nobody asks for
        index = DiffusionPipeline.load_config(model.path, local_files_only=True)
        absent = {part: None for part in (*_TEXT, "safety_checker", "feature_extractor") if part in index}
        self._pipeline: Any = DiffusionPipeline.from_pretrained(
            model.path, local_files_only=True, dtype=dtype, use_safetensors=True, **absent
        ).to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._config = self._pipeline.scheduler.config
        self._family = model.family
        self._device, self._dtype = device, dtype
        self._thread = ThreadPoolExecutor(1, "stock")

    async def send(self, order: ImageRequest, schedule: Schedule) -> Image.Image:
        """Wait for the turn, then for the image."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.draw, order, schedule)

    def draw(self, order: ImageRequest, schedule: Schedule) -> Image.Image:
        """The pipeline reads one text throughout: the first step's."""
        if order.scheduler is not None:
            sampler = SAMPLERS[order.scheduler]
            self._pipeline.scheduler = getattr(diffusers, sampler.cls).from_config(self._config, **sampler.options)
        image: Image.Image = self._pipeline(
            **self._embeddings(conditioning_at(schedule, 0)),
            width=order.width,
            height=order.height,
            num_inference_steps=order.num_inference_steps,
            guidance_scale=order.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(order.seed),
        ).images[0]
        return image

    def close(self) -> None:
        self._thread.shutdown()

    def _embeddings(self, text: Conditioning) -> dict[str, torch.Tensor | None]:
        given: dict[str, torch.Tensor | None] = {
            "prompt_embeds": text.positive,
            "negative_prompt_embeds": text.negative,
        }
        if text.pooled is not None:
            given |= {"pooled_prompt_embeds": text.pooled, "negative_pooled_prompt_embeds": text.negative_pooled}
        return {
            name: None if each is None else each.unsqueeze(0).to(self._device, self._dtype)
            for name, each in given.items()
        }
