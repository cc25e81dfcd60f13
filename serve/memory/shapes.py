"""The shapes of models: of the published ones by a table, of a folder by its configurations and tensor headers."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from serve.memory.terms import ModelShape
from serve.models import ModelFolder
from serve.models.denoiser_configs import KINDS
from serve.models.weight_files import read_headers, read_json, weight_files

TABLE = Path(__file__).parent / "published.json"
"""Written by scripts/model_facts.py."""
BLOCK = re.compile(r"((?:.*\.)?\w*transformer_blocks\.\d+)\.")
"""How the name of a tensor begins that lies in a repeated block (serve/diffusion/families/speed.py, `blocks`)."""
TEXT_TOKENS: Mapping[str, int] = {"sd3": 333, "flux": 512, "pixart": 300, "auraflow": 256}
"""By family, what T5 gives at most, and under SD 3 CLIP's row above it."""


@cache
def published() -> Mapping[str, ModelShape]:
    """By name, the models that people know."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return MappingProxyType({name: ModelShape(name=name, **about) for name, about in table.items()})


def shape_of(model: ModelFolder) -> ModelShape:
    """Of a folder with a denoiser; no tensor is read. Raises OperatorError naming `model.source`."""
    denoiser = model.denoiser
    assert denoiser is not None, "models that are drawn have one"
    part = model.path / KINDS[model.family].part
    longest = [each.row_tokens or each.longest_row for each in model.text]
    tensors = {name: info.shape for name, info in read_headers(weight_files(part)).items()}
    vae = read_headers(weight_files(model.path / "vae"))
    return ModelShape(
        name=model.name,
        family=model.family,
        **counted(tensors),
        vae_parameters=sum(math.prod(info.shape) for info in vae.values()),
        vae_scale_factor=denoiser.vae_scale_factor,
        size_multiple=denoiser.size_multiple,
        default_width=denoiser.default_width,
        default_height=denoiser.default_height,
        guided=denoiser.guidance == "classifier_free",
        text_tokens=TEXT_TOKENS.get(model.family) or max(each or 0 for each in longest),
        denoiser=read_json(part / "config.json"),
        vae=read_json(model.path / "vae" / "config.json"),
    )


def counted(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The numbers of a denoiser with these tensors, as ModelShape's fields."""
    blocks, modules, linear = Counter[str](), Counter[str](), 0
    for name, shape in tensors.items():
        numbers = math.prod(shape)
        modules[name.rpartition(".")[0]] += numbers
        if block := BLOCK.match(name):
            blocks[block[1]] += numbers
            linear += numbers * (name.endswith(".weight") and len(shape) == 2)
    parents = {"", *(name.rpartition(".")[0] for name in modules)}
    parents |= {parent.rpartition(".")[0] for parent in parents}
    layers = {name: numbers for name, numbers in modules.items() if name not in parents}
    total = modules.total()
    return {
        "parameters": total,
        "linear": linear,
        "outside": total - blocks.total(),
        "largest_block": max(blocks.values(), default=0),
        "largest_layer": max(layers.values(), default=0),
        "loose": total - sum(layers.values()),
    }
