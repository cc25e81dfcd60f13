"""Settings of what an order may say: its limits, templates of prompts, learned concepts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from serve.settings.room import MIB, Room


class LimitSettings(Room):
    max_prompt_bytes: int = Field(8192, ge=1, le=16_384)
    """Longest prompt or negative prompt, in UTF-8 bytes."""
    max_num_inference_steps: int = Field(150, ge=1)
    """Most denoising steps of one request."""
    max_num_images: int = Field(10, ge=1)
    """Most images of one request."""
    max_side: int = Field(2048, ge=64)
    """Largest width or height, in pixels."""
    max_guidance_scale: float = Field(50.0, ge=1)
    """Largest guidance scale."""
    max_image_bytes: int = Field(11 * MIB, ge=1024)
    """Largest file of an image or mask to start from. By default both fit into `http.max_body_bytes`."""
    max_image_pixels: int = Field(4096 * 4096, ge=4096)
    """Most pixels of an image or mask to start from; it is refused before it is decoded."""


class ArmSettings(Room):
    text: str
    """The prompt, like a template's `text`."""
    negative_prompt: str | None = None
    """What the pictures must not show, where an order does not say it; by default the template's."""
    share: float = Field(1.0, gt=0, allow_inf_nan=False)
    """How many of the template's orders it gets, beside the others' shares."""


class TemplateSettings(Room):
    text: str | None = None
    """The prompt. `{subject}` stands for the order's variable of that name, `{prompt}` for its prompt, `{a|b}` for one
    of them, by the order's seed. Not beside `arms`."""
    negative_prompt: str | None = None
    """What the pictures must not show, where an order does not say it; written like `text`."""
    syntax: Literal["a1111", "compel"] = "a1111"
    """What the texts are written in."""
    arms: dict[str, ArmSettings] = {}
    """Texts that are held against one another, by name: an order gets one of them by its seed, or names it. Metrics
    count them apart."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if (self.text is None) is not bool(self.arms):
            raise ValueError("a template has either a text or arms")
        return self


class PromptSettings(Room):
    templates: dict[str, TemplateSettings] = {}
    """Prompts that orders name in `template`: `{portrait: {text: "a portrait of {subject}, oil on canvas"}}`."""


class ConceptSettings(Room):
    folder: Path | None = None
    """Folder of learned concepts (textual inversion): `NAME.safetensors` is what prompts write as `<NAME>`. By default
    `concepts` under `data_dir`; every node must see the same one."""
