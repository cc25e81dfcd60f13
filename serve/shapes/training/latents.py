"""The U-Net's training set: scenes, and their latents encoded once.

Scene i follows from the seed and i alone, so only the latents are stored.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from serve.shapes.captions import Phrase, training_row
from serve.shapes.draw import Scene, render
from serve.shapes.training import parallel
from serve.shapes.training.config import Recipe
from serve.shapes.training.vae import to_tensor

STAGE = 3
CHUNK = 4
"""Pictures encoded at once; so few that their activations stay in the cache, 3 times as fast as 32."""


def row(seed: int, index: int) -> tuple[Scene, Phrase | None]:
    """Training row ``index``: a scene, and its phrase where the row mixes colours."""
    return training_row(np.random.default_rng([seed, STAGE, index]))


@torch.no_grad()
def encode_latents(recipe: Recipe, vae_folder: Path, out: Path) -> None:
    """Draw and encode every row; worker r takes rows r, r + workers, ... and writes its own shard into ``out``."""
    vae = AutoencoderKL.from_pretrained(vae_folder).eval().to(memory_format=torch.channels_last)
    mine = range(parallel.rank(), recipe.latents, parallel.world())
    encoded = []
    for start in range(0, len(mine), CHUNK):
        images = to_tensor([render(row(recipe.seed, index)[0]) for index in mine[start : start + CHUNK]])
        images = images.to(memory_format=torch.channels_last)
        encoded.append((vae.encode(images).latent_dist.mean * vae.config.scaling_factor).half().contiguous())
        if start % 4000 == 0:
            parallel.say(f"latents {start}/{len(mine)}")
    out.mkdir(parents=True, exist_ok=True)
    save_file({"latents": torch.cat(encoded)}, out / f"{parallel.rank()}-of-{parallel.world()}.safetensors")


def load_latents(folder: Path) -> Tensor:
    """All rows in order: (n, 4, 16, 16) float16, scaled to unit deviation."""
    shards = [load_file(path)["latents"] for path in sorted(folder.glob("*.safetensors"))]
    rows = torch.empty(sum(map(len, shards)), *shards[0].shape[1:], dtype=shards[0].dtype)
    for index, shard in enumerate(shards):
        rows[index :: len(shards)] = shard
    return rows
