"""The denoiser and the VAE of a model folder, checked from their configurations and safetensors headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serve.domain.orders import Task
from serve.models.defaults import defaults
from serve.models.denoiser import Denoiser
from serve.models.denoiser_configs import KINDS, Config, Kind, Reading, Shape, pooled_width
from serve.models.text_parts import TextPart, class_of
from serve.models.weight_files import TensorInfo, read_headers, read_json, refused, weight_files

VAE = "AutoencoderKL"
STOCK_GRID = 8
"""Diffusers' pipelines take no side that this does not divide, however small the VAE's factor."""
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_STORED = frozenset({"F64", "F32", "F16", "BF16"})
_FORMERLY: Mapping[str, str] = {"PixArtTransformer2DModel": "Transformer2DModel"}
"""Names under which older versions of diffusers wrote a class."""
_INPAINTS = frozenset({"sd", "sdxl"})
"""Families that have U-Nets which read a mask and the masked image beside the latents."""
_TASKS: Mapping[str, frozenset[Task]] = {
    "sdxl_refiner": frozenset({Task.IMG2IMG, Task.INPAINT}),
    "pixart": frozenset({Task.TXT2IMG}),
    "auraflow": frozenset({Task.TXT2IMG}),
}
"""Those of the other families are all three, unless the U-Net reads a mask."""


def image_parts(
    folder: Path, name: str, family: str, index: Mapping[str, Any], text: Sequence[TextPart], context_width: int
) -> Denoiser:
    """`name` is the source's, `index` model_index.json, `context_width` what the text encoders give. Raises
    OperatorError."""
    kind = KINDS[family]
    for part, cls in ((kind.part, kind.cls), ("vae", VAE)):
        if (found := class_of(index, part)) not in (cls, _FORMERLY.get(cls, cls)):
            raise refused(f"{folder}: its {part} is {found or 'missing'}; {cls} is what the {family} family has")
    config, vae = (Config(folder / part, read_json(folder / part / "config.json")) for part in (kind.part, "vae"))
    reading = kind.read(config, family)
    channels = vae.number("latent_channels")
    _check_fit(folder, family, config, reading, channels, context_width)
    if reading.pooled and reading.pooled[1] != (width := pooled_width(family, config, text)):
        raise refused(f"{config.part}: its {reading.pooled[0]} is {reading.pooled[1]}, the model's text gives {width}")
    scheduler, prediction_type = _scheduler(folder, family, kind)
    _check_weights(config, reading.tensors)
    _check_weights(vae, _vae_tensors(vae, channels))
    factor = 2 ** (len(vae.numbers("block_out_channels")) - 1)
    chosen = defaults(folder, name, family, reading.guidance, scheduler)
    grid = math.lcm(factor * reading.grid, STOCK_GRID)
    height, width = (max(side * factor // grid, 1) * grid for side in reading.height_width)
    return Denoiser(
        default_width=width,
        default_height=height,
        size_multiple=grid,
        vae_scale_factor=factor,
        latent_channels=channels,
        in_channels=reading.in_channels,
        prediction_type=prediction_type,
        process="edm" if _sampler(scheduler).startswith("EDM") else kind.process,
        guidance=reading.guidance,
        tasks=frozenset({Task.INPAINT}) if reading.in_channels > channels else _TASKS.get(family, frozenset(Task)),
        default_num_inference_steps=chosen.num_inference_steps,
        default_guidance_scale=chosen.guidance_scale,
        default_strength=chosen.strength,
        largest_side=None if reading.largest_side is None else reading.largest_side * factor,
    )


def _check_fit(folder: Path, family: str, config: Config, reading: Reading, channels: int, context_width: int) -> None:
    """The denoiser reads what the VAE and the text encoders give."""
    known = [channels, 2 * channels + 1] if family in _INPAINTS else [channels]
    if reading.in_channels not in known:
        raise refused(
            f"{config.part}: it reads {reading.in_channels} channels (in_channels); with the VAE's {channels} latent "
            f"channels {' or '.join(map(str, known))} is what is served"
        )
    if reading.out_channels != channels:
        raise refused(f"{config.part}: it predicts {reading.out_channels} channels, the VAE has {channels}")
    if reading.largest_side is not None and max(reading.height_width) > reading.largest_side:
        raise refused(f"{config.part}: its sample_size is more than pos_embed_max_size has positions for")
    field, width = reading.context
    if width != context_width:
        raise refused(f"{folder}: its denoiser reads text {width} wide ({field}), its text is {context_width} wide")


def _scheduler(folder: Path, family: str, kind: Kind) -> tuple[Mapping[str, Any], str]:
    """The model's own sampler's configuration, and what the denoiser predicts."""
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    sampler = _sampler(config)
    if sampler.startswith("FlowMatch") != (kind.process == "flow"):
        raise refused(f"{file}: a {sampler} is not what the {family} family was trained with")
    if kind.process == "flow":
        return config, "flow_prediction"
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise refused(f"{file}: its prediction_type is {prediction}; {', '.join(_PREDICTIONS)} are what is known")
    return config, prediction


def _sampler(config: Mapping[str, Any]) -> str:
    return str(config.get("_class_name"))


def _vae_tensors(vae: Config, channels: int) -> dict[str, Shape]:
    widths = vae.numbers("block_out_channels")
    return {
        "encoder.conv_in.weight": (widths[0], 3, 3, 3),
        "encoder.conv_out.weight": (2 * channels, widths[-1], 3, 3),
        "decoder.conv_in.weight": (widths[-1], channels, 3, 3),
        "decoder.conv_out.weight": (3, widths[0], 3, 3),
    }


def _check_weights(config: Config, tensors: Mapping[str, Shape]) -> None:
    """Raises OperatorError unless the files of a part hold `tensors`."""
    if "quantization_config" in config.values:
        raise refused(f"{config.part}: its weights are quantized (quantization_config); save them unquantized")
    found = read_headers(weight_files(config.part))
    for name, shape in tensors.items():
        _expect(config.part, found, name, shape)


def _expect(part: Path, tensors: Mapping[str, TensorInfo], name: str, shape: Shape) -> None:
    full = next((key for key in tensors if key == name or (name[0] == "." and key.endswith(name))), None)
    if full is None:
        raise refused(f"{part}: the weights are of something else or not all there, they have no {name.lstrip('.')}")
    found = tensors[full]
    if len(found.shape) != len(shape) or any(
        want not in (None, have) for have, want in zip(found.shape, shape, strict=True)
    ):
        raise refused(f"{part}: {full} has the shape {list(found.shape)}, its configuration says otherwise")
    if found.dtype not in _STORED:
        raise refused(f"{part}: {full} is stored as {found.dtype}; {', '.join(sorted(_STORED))} are what is read")
