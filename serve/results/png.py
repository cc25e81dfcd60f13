"""PNG files that say how they were made, twice: as JSON (exact) and in the text form of AUTOMATIC1111's web UI.

The text form is what other tools read when a picture is dropped on them
(https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features#png-info).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image, PngImagePlugin

from serve.domain import ImageRequest
from serve.errors import InvalidRequest
from serve.models.samplers import SAMPLERS
from serve.results.keys import reference

_JSON = "tandem"
_TEXT = "parameters"
_NOT_KEPT = ("salt", "num_images", "preview_every")
"""Fields of a request that say nothing of the picture, or nothing to anybody else."""


def parameters(request: ImageRequest, index: int, approximate: Sequence[str] = ()) -> dict[str, Any]:
    """What is written into image `index` of a job: an order that repeats this picture alone, without the fields that
    have no value, and `approximate`, what kept the picture from being exact."""
    known = {name: value for name, value in asdict(request).items() if name not in _NOT_KEPT and value is not None}
    known["seed"] = request.seed + index
    for field in ("image", "mask"):
        if field in known:
            known[field] = reference(known[field])
    return known | ({"approximate": list(approximate)} if approximate else {})


def encode_png(image: Image.Image, parameters: Mapping[str, Any]) -> bytes:
    """The image as PNG with `parameters`, whose values JSON can hold. Equal input gives equal bytes."""
    chunks = PngImagePlugin.PngInfo()
    # Latin-1 goes into a tEXt chunk, everything else into iTXt; a lone surrogate has no UTF-8.
    chunks.add_text(_TEXT, as_text(parameters).encode("utf-8", "replace").decode())
    chunks.add_text(_JSON, json.dumps(dict(parameters)))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


def read_parameters(data: bytes) -> dict[str, Any]:
    """What `encode_png` was given. InvalidRequest for a file that is no PNG or was made by something else."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            parameters = json.loads(image.info.get(_JSON, "null"))
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError):
        raise InvalidRequest("the file is not a readable PNG", "image") from None
    if not isinstance(parameters, dict):
        raise InvalidRequest("the PNG does not say how it was made", "image")
    return parameters


def as_text(parameters: Mapping[str, Any]) -> str:
    """Prompt, negative prompt and one line of settings, in A1111's form."""
    lines = [str(parameters.get("prompt", ""))]
    if parameters.get("negative_prompt"):
        lines.append(f"Negative prompt: {parameters['negative_prompt']}")
    lines.append(", ".join(f"{label}: {_quoted(value)}" for label, value in _settings(parameters).items()))
    return "\n".join(lines)


def _settings(known: Mapping[str, Any]) -> dict[str, Any]:
    """A1111's labels, and Forge's where it has none, in their order. Its clip skip counts from 1."""
    settings = {"Steps": known.get("num_inference_steps")}
    sampler = SAMPLERS.get(str(known.get("scheduler")))
    settings["Sampler"] = sampler.label if sampler else None
    if known.get("true_cfg_scale") is None:
        settings["CFG scale"] = known.get("guidance_scale")
    else:
        settings["CFG scale"] = known["true_cfg_scale"]
        settings["Distilled CFG Scale"] = known.get("guidance_scale")
    settings["Seed"] = known.get("seed")
    settings["Size"] = f"{known['width']}x{known['height']}" if "width" in known and "height" in known else None
    settings["Model"] = known.get("model")
    settings["Denoising strength"] = known.get("strength")
    clip_skip = known.get("clip_skip")
    settings["Clip skip"] = clip_skip + 1 if isinstance(clip_skip, int) else None
    return {label: value for label, value in settings.items() if value is not None}


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
