"""What the configuration of each kind of denoiser says, and which tensors tell whether the weights are of it.

Names and shapes are those of diffusers' models. The tensors are few: the first and the last layer of the stack, what
reads the text, and what sets kinds apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.models.denoiser import Guidance
from serve.models.samplers import Process
from serve.models.text_parts import TextPart
from serve.models.weight_files import refused

Shape = tuple[int | None, ...]
"""None stands for a size that is not told by the configuration."""
TIME_IDS: Mapping[str, int] = {"sdxl": 6, "sdxl_refiner": 5}
"""Original size, crop and target size; the refiner reads an aesthetic score instead of the target's two numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A configuration, read. Sizes are latents.

    `grid` is what both sides have to be a multiple of. `context` and `pooled` are each the configuration's field, and
    the width of text that it promises. `tensors` maps a name (with a dot before it: the end of one) to its shape.
    """

    in_channels: int
    out_channels: int
    grid: int
    height_width: tuple[int, int]
    largest_side: int | None
    guidance: Guidance
    context: tuple[str, int]
    pooled: tuple[str, int] | None
    tensors: Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Config:
    """The JSON of one part. What is missing or no positive number is refused by name."""

    part: Path
    values: Mapping[str, Any]

    def number(self, field: str, default: int | None = None) -> int:
        value = self.values.get(field)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise refused(f"{self.part}: its configuration lacks or garbles {field} ({value})")
        return value

    def numbers(self, field: str) -> tuple[int, ...]:
        values = self.values.get(field)
        if not isinstance(values, list) or not values or any(type(value) is not int or value < 1 for value in values):
            raise refused(f"{self.part}: its configuration lacks or garbles {field} ({values})")
        return tuple(values)

    def sides(self, field: str, default: int) -> tuple[int, int]:
        """Height and width, which may be written as one number."""
        if isinstance(self.values.get(field), list):
            sides = self.numbers(field)
            if len(sides) != 2:
                raise refused(f"{self.part}: its configuration garbles {field} ({list(sides)})")
            return sides[0], sides[1]
        return (self.number(field, default),) * 2

    def expect(self, field: str, known: object, missing: object = None) -> None:
        """`missing` is what a configuration without the field means."""
        if (found := self.values.get(field, missing)) != known:
            raise refused(f"{self.part}: its {field} is {found}; {known} is what is served")


@dataclass(frozen=True, slots=True)
class Kind:
    """`part` is the folder's name in the diffusers layout, `cls` diffusers' class."""

    part: str
    cls: str
    process: Process
    read: Callable[[Config, str], Reading]


def pooled_width(family: str, config: Config, text: Sequence[TextPart]) -> int:
    """The width of what the family lays side by side for its denoiser's pooled input."""
    if family in TIME_IDS:
        return (text[-1].projection or 0) + TIME_IDS[family] * config.number("addition_time_embed_dim")
    if family == "sd3":
        return sum(part.projection or 0 for part in text)
    return text[0].width


def _unet(config: Config, family: str) -> Reading:
    xl = family in TIME_IDS
    config.expect("addition_embed_type", "text_time" if xl else None)
    for field in ("class_embed_type", "encoder_hid_dim_type", "num_class_embeds"):
        config.expect(field, None)
    widths, channels = config.numbers("block_out_channels"), config.number("in_channels")
    out_channels, context = config.number("out_channels"), config.number("cross_attention_dim")
    tensors: dict[str, Shape] = {
        "conv_in.weight": (widths[0], channels, 3, 3),
        "conv_out.weight": (out_channels, widths[0], 3, 3),
        f"down_blocks.{len(widths) - 1}.resnets.0.conv1.weight": (widths[-1], None, 3, 3),
        ".transformer_blocks.0.attn2.to_k.weight": (None, context),
    }
    if distilled := config.values.get("time_cond_proj_dim"):
        tensors["time_embedding.cond_proj.weight"] = (None, distilled)
    pooled = None
    if xl:
        pooled = "projection_class_embeddings_input_dim", config.number("projection_class_embeddings_input_dim")
        tensors["add_embedding.linear_1.weight"] = (None, pooled[1])
    return Reading(
        in_channels=channels,
        out_channels=out_channels,
        grid=1,
        height_width=config.sides("sample_size", 128 if xl else 64),
        largest_side=None,
        guidance="embedded" if distilled else "classifier_free",
        context=("cross_attention_dim", context),
        pooled=pooled,
        tensors=tensors,
    )


def _sd3(config: Config, _: str) -> Reading:
    patch, channels = config.number("patch_size"), config.number("in_channels")
    width = config.number("num_attention_heads") * config.number("attention_head_dim")
    positions, layers = config.number("pos_embed_max_size"), config.number("num_layers")
    out_channels = config.number("out_channels", channels)
    context, pooled = config.number("joint_attention_dim"), config.number("pooled_projection_dim")
    tensors: dict[str, Shape] = {
        "pos_embed.proj.weight": (width, channels, patch, patch),
        "pos_embed.pos_embed": (1, positions**2, width),
        "context_embedder.weight": (config.number("caption_projection_dim"), context),
        "time_text_embed.text_embedder.linear_1.weight": (width, pooled),
        f"transformer_blocks.{layers - 1}.attn.to_q.weight": (width, width),
        "proj_out.weight": (patch * patch * out_channels, width),
    }
    return Reading(
        in_channels=channels,
        out_channels=out_channels,
        grid=patch,
        height_width=config.sides("sample_size", 128),
        largest_side=positions * patch,
        guidance="classifier_free",
        context=("joint_attention_dim", context),
        pooled=("pooled_projection_dim", pooled),
        tensors=tensors,
    )


def _flux(config: Config, _: str) -> Reading:
    """FLUX packs 2 x 2 latents into one token of four times the channels; the transformer itself has no patches."""
    config.expect("patch_size", 1, missing=1)
    packed = config.number("in_channels")
    if packed % 4:
        raise refused(f"{config.part}: its in_channels are {packed}, which are not 2 x 2 latents")
    width = config.number("num_attention_heads") * config.number("attention_head_dim")
    context, pooled = config.number("joint_attention_dim"), config.number("pooled_projection_dim")
    out_channels = config.number("out_channels", packed)
    embeds = config.values.get("guidance_embeds", False)
    tensors: dict[str, Shape] = {
        "x_embedder.weight": (width, packed),
        "context_embedder.weight": (width, context),
        "time_text_embed.text_embedder.linear_1.weight": (width, pooled),
        f"transformer_blocks.{config.number('num_layers') - 1}.attn.to_q.weight": (width, width),
        f"single_transformer_blocks.{config.number('num_single_layers') - 1}.attn.to_q.weight": (width, width),
        "proj_out.weight": (out_channels, width),
    }
    if embeds:
        tensors["time_text_embed.guidance_embedder.linear_1.weight"] = (width, 256)
    return Reading(
        in_channels=packed // 4,
        out_channels=out_channels // 4,
        grid=2,
        height_width=(128, 128),
        largest_side=None,
        guidance="embedded" if embeds else "none",
        context=("joint_attention_dim", context),
        pooled=("pooled_projection_dim", pooled),
        tensors=tensors,
    )


def _pixart(config: Config, _: str) -> Reading:
    """Half of the output is the variance, which no sampler here reads."""
    patch, channels = config.number("patch_size"), config.number("in_channels")
    width = config.number("num_attention_heads") * config.number("attention_head_dim")
    out_channels, context = config.number("out_channels", channels), config.number("caption_channels")
    if out_channels not in (channels, 2 * channels):
        raise refused(f"{config.part}: its out_channels are {out_channels}, its in_channels {channels}")
    return Reading(
        in_channels=channels,
        out_channels=channels,
        grid=patch,
        height_width=config.sides("sample_size", 128),
        largest_side=None,
        guidance="classifier_free",
        context=("caption_channels", context),
        pooled=None,
        tensors={
            "pos_embed.proj.weight": (width, channels, patch, patch),
            "caption_projection.linear_1.weight": (width, context),
            f"transformer_blocks.{config.number('num_layers') - 1}.attn2.to_q.weight": (width, width),
            "scale_shift_table": (2, width),
            "proj_out.weight": (patch * patch * out_channels, width),
        },
    )


def _auraflow(config: Config, _: str) -> Reading:
    """Its position embeddings are a square, of which an image takes the middle."""
    patch, channels = config.number("patch_size"), config.number("in_channels")
    width = config.number("num_attention_heads") * config.number("attention_head_dim")
    positions, context = config.number("pos_embed_max_size"), config.number("joint_attention_dim")
    out_channels = config.number("out_channels", channels)
    singles = config.number("num_single_dit_layers")
    return Reading(
        in_channels=channels,
        out_channels=out_channels,
        grid=patch,
        height_width=config.sides("sample_size", 64),
        largest_side=math.isqrt(positions) * patch,
        guidance="classifier_free",
        context=("joint_attention_dim", context),
        pooled=None,
        tensors={
            "pos_embed.proj.weight": (width, patch * patch * channels),
            "pos_embed.pos_embed": (1, positions, width),
            "register_tokens": (1, None, width),
            "context_embedder.weight": (config.number("caption_projection_dim"), context),
            f"single_transformer_blocks.{singles - 1}.attn.to_q.weight": (width, width),
            "proj_out.weight": (patch * patch * out_channels, width),
        },
    )


KINDS: Mapping[str, Kind] = {
    "sd": Kind("unet", "UNet2DConditionModel", "diffusion", _unet),
    "sdxl": Kind("unet", "UNet2DConditionModel", "diffusion", _unet),
    "sdxl_refiner": Kind("unet", "UNet2DConditionModel", "diffusion", _unet),
    "sd3": Kind("transformer", "SD3Transformer2DModel", "flow", _sd3),
    "flux": Kind("transformer", "FluxTransformer2DModel", "flow", _flux),
    "pixart": Kind("transformer", "PixArtTransformer2DModel", "diffusion", _pixart),
    "auraflow": Kind("transformer", "AuraFlowTransformer2DModel", "flow", _auraflow),
}
"""By family."""
