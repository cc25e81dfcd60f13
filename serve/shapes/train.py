"""Reproduces the shipped model from a seed: ``python -m serve.shapes.train --out DIR [--seed 0] [--quick]``.

Stages, each skipped when its result is there (so a stopped run goes on where it was):

1. ``tokenizer``     byte-pair merges from captions
2. ``vae``           the autoencoder, from crops to whole pictures
3. ``latents``       every training picture, encoded once
4. ``text_encoder``  learns to read captions
5. ``unet``          learns to denoise; checkpoints every 500 steps, snapshots in ``snapshots/``
6. ``vae_polished``  the decoder learns to draw the U-Net's own estimates
7. ``model``         all parts together, in the ordinary diffusers layout
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from diffusers import AutoencoderKL

from serve.shapes.training import parallel
from serve.shapes.training.config import QUICK, Recipe
from serve.shapes.training.latents import encode_latents
from serve.shapes.training.polish import polish_decoder
from serve.shapes.training.text import train_text
from serve.shapes.training.tokenizer import train_tokenizer
from serve.shapes.training.unet import train_unet
from serve.shapes.training.vae import train_vae


def train(recipe: Recipe, run: Path) -> Path:
    """Run every missing stage in the folder ``run``; returns the model's folder."""
    run.mkdir(parents=True, exist_ok=True)
    _stage(run / "tokenizer", lambda out: train_tokenizer(recipe.seed, out))
    _stage(run / "vae", lambda out: parallel.run(recipe.workers, train_vae, recipe, out))
    _stage(run / "latents", lambda out: parallel.run(recipe.workers, encode_latents, recipe, run / "vae", out))
    _stage(run / "text_encoder", lambda out: parallel.run(recipe.workers, train_text, recipe, run / "tokenizer", out))
    _stage(run / "unet", lambda out: parallel.run(recipe.workers, train_unet, recipe, run, out))
    _stage(run / "vae_polished", lambda out: parallel.run(recipe.workers, polish_decoder, recipe, run / "unet", out))
    _stage(run / "model", lambda out: _assemble(run, out))
    return run / "model"


def _stage(out: Path, work: Callable[[Path], None]) -> None:
    """Do ``work`` into a temporary folder and rename it to ``out``, unless ``out`` is there."""
    if out.exists():
        print(f"{out.name}: there already", flush=True)
        return
    part = out.with_name(out.name + ".unfinished")
    shutil.rmtree(part, ignore_errors=True)
    began = time.monotonic()
    work(part)
    part.rename(out)
    print(f"{out.name}: done in {time.monotonic() - began:.0f} s", flush=True)


def _assemble(run: Path, out: Path) -> None:
    """The U-Net's pipeline with the polished autoencoder in half precision, and what it draws best with."""
    shutil.copytree(run / "unet", out)
    best = {"num_inference_steps": 20, "guidance_scale": 3.0}
    (out / "generation_config.json").write_text(json.dumps(best, indent=2) + "\n")
    AutoencoderKL.from_pretrained(run / "vae_polished").half().save_pretrained(out / "vae")


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m serve.shapes.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the model goes to DIR/model")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--workers", type=int, help="processes; the weights depend on it (shipped: 2)")
    parser.add_argument("--unet-steps", type=int, help="length of the U-Net's training")
    parser.add_argument("--quick", action="store_true", help="every stage in a minute, to test the machinery")
    options = parser.parse_args(arguments)
    recipe = replace(QUICK if options.quick else Recipe(), seed=options.seed)
    changes = {"workers": options.workers, "unet_steps": options.unet_steps}
    recipe = replace(recipe, **{name: value for name, value in changes.items() if value is not None})
    print(f"model in {train(recipe, options.out)}", flush=True)


if __name__ == "__main__":
    main()
