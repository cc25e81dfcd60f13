"""Folders of published models, at their full size, without any weight: the configurations and the tensors' headers are
there, and behind them a hole in the file. What reads no tensor can't tell the difference.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from serve.bench.footprints import CLASSES, built
from serve.domain.orders import Task
from serve.memory.shapes import published
from serve.models import ModelFolder
from serve.models.denoiser import Denoiser
from serve.models.denoiser_configs import KINDS
from serve.models.text_parts import TextPart


def published_model(path: Path, name: str, called: str | None = None) -> ModelFolder:
    """As `resolve` gives it, under the name `called`. Only the image side lies in the folder."""
    from diffusers import AutoencoderKL

    shape = published()[name]
    denoiser = built(CLASSES[shape.family], shape.denoiser, "float16")
    _write(path / KINDS[shape.family].part, shape.denoiser, denoiser)
    _write(path / "vae", shape.vae, built(AutoencoderKL, shape.vae, "float16"))
    text = TextPart(
        role="text_encoder",
        kind="clip",
        name="clip-l",
        weights=path,
        tokenizer=path,
        width=768,
        layers=12,
        vocab_size=49_408,
        projection=None,
        row_tokens=77,
    )
    return ModelFolder(
        name=called or name,
        path=path,
        family=shape.family,
        text=(text,),
        context_width=768,
        zero_empty_negative=False,
        denoiser=Denoiser(
            default_width=shape.default_width,
            default_height=shape.default_height,
            size_multiple=shape.size_multiple,
            vae_scale_factor=shape.vae_scale_factor,
            latent_channels=shape.vae["latent_channels"],
            in_channels=shape.denoiser["in_channels"],
            prediction_type="epsilon",
            process="diffusion",
            guidance="classifier_free" if shape.guided else "embedded",
            tasks=frozenset(Task),
            default_num_inference_steps=30,
            default_guidance_scale=7.5,
            default_strength=0.75,
        ),
    )


def _write(folder: Path, config: Mapping[str, Any], model: nn.Module) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
