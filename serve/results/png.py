"""PNG files that say how they were made, twice: as JSON (exact) and in the text form of AUTOMATIC1111's web UI.

The text form is what other tools read when a picture is dropped on them
(https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features#png-info).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image, PngImagePlugin

from serve.errors import InvalidRequest

_JSON = "tandem"
_TEXT = "parameters"
_NAMES = (
    ("Steps", "num_inference_steps"),
    ("CFG scale", "guidance_scale"),
    ("Seed", "seed"),
    ("Size", "size"),
    ("Model", "model"),
)


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
    known = dict(parameters)
    if "width" in known and "height" in known:
        known["size"] = f"{known['width']}x{known['height']}"
    lines = [str(known.get("prompt", ""))]
    if known.get("negative_prompt"):
        lines.append(f"Negative prompt: {known['negative_prompt']}")
    lines.append(", ".join(f"{label}: {_quoted(known[name])}" for label, name in _NAMES if name in known))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
