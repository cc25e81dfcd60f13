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
from typing import Any

from serve.memory.footprint import footprint
from serve.memory.terms import ModelShape
from serve.models import ModelFolder
from serve.models.denoiser_configs import KINDS
from serve.models.image_parts import VAE
from serve.models.weight_files import read_headers, read_json, refused, weight_files
from serve.rungs import Rung

TABLE = Path(__file__).parent / "published.json"
"""Written by scripts/model_facts.py."""
DEFAULTS = TABLE.with_name("defaults.json")
"""What diffusers' classes take for a field that a configuration does not have; written by the same script."""
BLOCK = re.compile(r"((?:.*\.)?\w*transformer_blocks\.\d+)\.")
"""How the name of a tensor begins that lies in a repeated block (serve/diffusion/families/speed.py, `blocks`)."""
TEXT_TOKENS: Mapping[str, int] = {"sd3": 333, "flux": 512, "pixart": 300, "auraflow": 256}
"""By family, what T5 gives at most, and under SD 3 CLIP's row above it."""


@cache
def published() -> Mapping[str, ModelShape]:
    """By name, the models that people know."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return MappingProxyType({name: _of_table(name, **about) for name, about in table.items()})


def _of_table(name: str, family: str, denoiser: Mapping[str, Any], vae: Mapping[str, Any], **about: Any) -> ModelShape:
    kind = KINDS[family].cls
    return ModelShape(name=name, family=family, denoiser=complete(kind, denoiser), vae=complete(VAE, vae), **about)


def complete(cls: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration as the class of diffusers reads it. Older files lack fields that were added since, and many
    lack those that are as usual."""
    found = {**_defaults()[cls], **config}
    if found["out_channels"] is None:
        found["out_channels"] = found["in_channels"]
    return found


@cache
def _defaults() -> Mapping[str, Mapping[str, Any]]:
    """By class."""
    found: dict[str, dict[str, Any]] = json.loads(DEFAULTS.read_text(encoding="utf-8"))
    return found


def shape_of(model: ModelFolder) -> ModelShape:
    """Of a folder with a denoiser; no tensor is read. Raises OperatorError naming `model.source`."""
    denoiser = model.denoiser
    assert denoiser is not None, "models that are drawn have one"
    part = model.path / KINDS[model.family].part
    longest = [each.row_tokens or each.longest_row for each in model.text]
    tensors = {name: info.shape for name, info in read_headers(weight_files(part)).items()}
    vae = read_headers(weight_files(model.path / "vae"))
    shape = ModelShape(
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
        denoiser=complete(KINDS[model.family].cls, read_json(part / "config.json")),
        vae=complete(VAE, read_json(model.path / "vae" / "config.json")),
    )
    _check(shape, model.path)
    return shape


def _check(shape: ModelShape, folder: Path) -> None:
    """Configurations that contradict themselves are refused here, where the file can be named: diffusers would not
    build the model either."""
    try:
        footprint(shape, "float32", Rung.RESIDENT, shape.default_width, shape.default_height, shape.lanes)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise refused(f"{folder}: its denoiser's or its VAE's config.json garbles a field ({error})") from error


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
