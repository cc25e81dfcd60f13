"""What a picture says of itself, twice: as JSON (exact) and in the text form of AUTOMATIC1111's web UI; and PNG files
that say it.

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
from serve.models.samplers import SAMPLERS

JSON_CHUNK = "tandem"
_TEXT = "parameters"
COMPRESS_LEVEL = 3
"""zlib's: half of the time of its default (6), for files of 1 % less to 18 % more (docs/performance.md)."""
_NOT_KEPT = ("salt", "num_images", "preview_every", "image", "mask", "composed", "template", "arm")
"""Fields of a request that say nothing of the picture, or that are nobody else's: a reference to what the job started
from opens that to whoever is shown the picture."""


def parameters(request: ImageRequest, index: int, approximate: Sequence[str] = ()) -> dict[str, Any]:
    """What is written into image `index` of a job: the order of this picture alone, without the fields that have no
    value and without what it starts from, and `approximate`, what kept the picture from being exact."""
    known = {name: value for name, value in asdict(request).items() if name not in _NOT_KEPT and value is not None}
    known["seed"] = request.seed + index
    return known | ({"approximate": list(approximate)} if approximate else {})


def encode_png(image: Image.Image, parameters: Mapping[str, Any]) -> bytes:
    """The image as PNG with `parameters`, whose values JSON can hold. Equal input gives equal bytes."""
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=_notes(parameters), compress_level=COMPRESS_LEVEL)
    return file.getvalue()


def text_chunks(parameters: Mapping[str, Any]) -> list[tuple[bytes, bytes]]:
    """What `encode_png` writes of them, as (kind, data)."""
    return [(kind, data) for kind, data, _ in _notes(parameters).chunks]


def _notes(parameters: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    notes = PngImagePlugin.PngInfo()
    # Latin-1 goes into a tEXt chunk, everything else into iTXt; a lone surrogate has no UTF-8.
    notes.add_text(_TEXT, as_text(parameters).encode("utf-8", "replace").decode())
    notes.add_text(JSON_CHUNK, json.dumps(dict(parameters)))
    return notes


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
