"""The text in which A1111's web UI says how a picture was made, as it and the tools beside it read it back:

    a red circle
    Negative prompt: blue
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 128x128, Model: shapes

https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features#png-info
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from serve.domain.orders import MaskedContent
from serve.models.a1111 import labels
from serve.models.samplers import SAMPLERS

PARAMETERS = "parameters"
"""The name of the text, where a file gives its texts names."""
NEGATIVE = "Negative prompt:"

_PROMPT, _NEGATIVE_PROMPT = "Prompt", "Negative prompt"
_ORIGINAL = MaskedContent.ORIGINAL.value
_LEAST = 3
"""With fewer settings than that, a text's last line is taken for prompt."""
_MOST_SETTINGS = 64 * 1024
"""Characters of a last line that is read as settings."""
# A label, and a value that is in quotes, as JSON has them, or goes on to the next comma. Labels are bounded, so that a
# long text from a stranger is read in one pass.
_SETTING = re.compile(r'(\w[\w \-/]{1,63}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"([0-9]+)x([0-9]+)")
_MARKS = (",", ":", "\n")


def as_text(parameters: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> str:
    """Prompt, negative prompt and one line of settings. `parameters` are those of `serve.results.png.parameters`;
    `more` is as `settings` has it."""
    prompt, negative = prompts(parameters, more)
    lines = [prompt, *([f"{NEGATIVE} {negative}"] if negative else [])]
    lines.append(", ".join(f"{label}: {_written(value)}" for label, value in settings(parameters, more).items()))
    return "\n".join(lines).strip()


def prompts(known: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """Prompt and negative prompt. `more` may have others, as `Prompt` and `Negative prompt`."""
    told = more or {}
    prompt, negative = (known.get(name) or "" for name in ("prompt", "negative_prompt"))
    return str(told.get(_PROMPT, prompt)), str(told.get(_NEGATIVE_PROMPT, negative))


def settings(known: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """By A1111's labels, and Forge's where it has none, in its order. Its clip skip counts from 1. `more` has labels
    that take the place of ours or follow them; None leaves a label out."""
    sampler, schedule = labels(known["scheduler"]) if known.get("scheduler") in SAMPLERS else (None, None)
    distilled = known.get("true_cfg_scale") is not None
    clip_skip = known.get("clip_skip")
    varied = known.get("variation_seed") is not None
    padding, content = known.get("padding_mask_crop"), str(known.get("masked_content", _ORIGINAL))
    told = {
        "Steps": known.get("num_inference_steps"),
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": known.get("true_cfg_scale" if distilled else "guidance_scale"),
        "Distilled CFG Scale": known.get("guidance_scale") if distilled else None,
        "Seed": known.get("seed"),
        "Size": f"{known['width']}x{known['height']}" if "width" in known and "height" in known else None,
        "Model": known.get("model"),
        "Variation seed": known.get("variation_seed"),
        "Variation seed strength": known.get("variation_strength") if varied else None,
        "Denoising strength": known.get("strength"),
        "Clip skip": clip_skip + 1 if isinstance(clip_skip, int) else None,
        "Mask blur": known.get("mask_blur"),
        "Masked content": None if content == _ORIGINAL else content.replace("_", " "),
        "Inpaint area": None if padding is None else "Only masked",
        "Masked area padding": padding,
    }
    told |= {label: value for label, value in (more or {}).items() if label not in (_PROMPT, _NEGATIVE_PROMPT)}
    return {label: value for label, value in told.items() if value is not None}


def read_text(text: str) -> dict[str, str]:
    """What such a text says: `Prompt`, `Negative prompt`, and each setting by its label; a size also in parts, as
    `Size-1` and `Size-2`. Whatever else the text may be is prompt."""
    *lines, last = text.strip().split("\n")
    found = _SETTING.findall(last) if len(last) <= _MOST_SETTINGS else []
    if len(found) < _LEAST:
        lines, found = [*lines, last], []
    prompt: list[str] = []
    negative: list[str] = []
    writing = prompt
    for line in map(str.strip, lines):
        if line.startswith(NEGATIVE):
            writing, line = negative, line.removeprefix(NEGATIVE).strip()
        writing.append(line)
    told = {_PROMPT: "\n".join(prompt).strip(), _NEGATIVE_PROMPT: "\n".join(negative).strip()}
    for label, value in found:
        plain = _plain(value)
        if size := _SIZE.fullmatch(plain):
            told[f"{label}-1"], told[f"{label}-2"] = size.groups()
        else:
            told[label] = plain
    return told


def _written(value: Any) -> str:
    """A value in quotes where a reader would end it too early, or take its own first character for a quote."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    open_ended = any(mark in text for mark in _MARKS) or text.startswith('"') or text != text.strip()
    return json.dumps(text, ensure_ascii=False) if open_ended else text


def _plain(value: str) -> str:
    if value[:1] == '"' == value[-1:]:
        try:
            return str(json.loads(value))
        except ValueError:  # a quote that closes nothing, or half of an escape
            return value
    return value
