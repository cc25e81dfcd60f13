"""The autoencoder: 128 px pictures <-> 4x16x16 latents (Kingma & Welling 2014; Rombach et al. 2022).

Training starts on small crops near the objects, where the edges are, and ends on whole pictures. The loss is L1 + L2
on pixels and L1 on their differences, which keeps edges sharp without an adversary.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from serve.shapes.draw import IMAGE_SIZE, RGB, SHAPES, Scene, Thing, render, sample_scene
from serve.shapes.training import parallel
from serve.shapes.training.config import Recipe
from serve.shapes.training.muon import Muon, wants_muon

STAGE = 2
"""Mixed into the random seeds, so that stages draw different scenes."""

LATENT_CHANNELS = 4


def make_vae(channels: tuple[int, ...]) -> AutoencoderKL:
    """A fresh autoencoder; the picture is halved once per channel count after the first."""
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
    )


def to_tensor(images: list[np.ndarray]) -> Tensor:
    """Pictures (h, w, 3) in 0..1 -> (n, 3, h, w) in -1..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous() * 2 - 1


def gradient_loss(images: Tensor, targets: Tensor) -> Tensor:
    """L1 between the horizontal and the vertical pixel differences."""
    error = images - targets
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    return across + (error[:, :, 1:] - error[:, :, :-1]).abs().mean()


def picture_loss(images: Tensor, targets: Tensor) -> Tensor:
    """L1 + L2 + half the gradient loss."""
    error = images - targets
    return error.abs().mean() + error.pow(2).mean() + 0.5 * gradient_loss(images, targets)


def train_vae(recipe: Recipe, out: Path) -> None:
    """Train and save to ``out``; runs in every worker of a group."""
    torch.manual_seed(recipe.seed)
    vae = make_vae(recipe.vae_channels)
    matrices = [p for name, p in vae.named_parameters() if wants_muon(name, p)]
    chosen = {id(p) for p in matrices}
    params = list(vae.parameters())
    muon = Muon(matrices)
    adam = torch.optim.AdamW(
        [p for p in params if id(p) not in chosen], recipe.vae_lr, betas=(0.9, 0.99), weight_decay=1e-3, foreach=True
    )
    average = [p.detach().clone() for p in params]
    torch.manual_seed(1000 * recipe.seed + parallel.rank())
    for step in range(recipe.vae_steps):
        progress = step / recipe.vae_steps
        rate = min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 0.01
        for group in adam.param_groups:
            group["lr"] = recipe.vae_lr * rate
        rng = np.random.default_rng([recipe.seed, STAGE, step, parallel.rank()])
        images = _batch(progress, recipe.vae_batch, rng)
        posterior = vae.encode(images).latent_dist
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        noise = recipe.latent_noise * torch.rand(len(images), 1, 1, 1) * torch.randn_like(posterior.mean)
        decoded = vae.decode(posterior.sample() + noise).sample
        loss = picture_loss(decoded, images) + recipe.kl_weight * kl
        loss.backward()
        parallel.average_gradients(params)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        adam.step()
        muon.step(recipe.vae_muon_lr * rate)
        vae.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - min(0.997, (1 + step) / (10 + step)))
        if step % 100 == 0:
            parallel.say(f"vae {step}/{recipe.vae_steps} loss {loss.item():.4f} kl {kl.item():.2f}")
    for param, mean in zip(params, average, strict=True):
        param.data.copy_(mean)
    if parallel.rank() == 0:
        psnr, spread = measure(vae)
        parallel.say(f"vae: {psnr:.2f} dB on held-out pictures, latent std {spread:.3f}")
        vae.register_to_config(scaling_factor=round(1 / spread, 5))
        vae.save_pretrained(out)


@torch.no_grad()
def measure(vae: AutoencoderKL, count: int = 64) -> tuple[float, float]:
    """Mean PSNR in dB over held-out pictures decoded from their mean latents, and the latents' standard deviation."""
    images = to_tensor([render(sample_scene(np.random.default_rng([9, i]), held_out=True)) for i in range(count)])
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(images, 8)])
    decoded = torch.cat([vae.decode(part).sample.clamp(-1, 1) for part in torch.split(latents, 8)])
    error = ((decoded - images) / 2).pow(2).mean((1, 2, 3))
    return float((-10 * error.log10()).mean()), float(latents.std())


def _batch(progress: float, batch: int, rng: np.random.Generator) -> Tensor:
    """Crops of 32 px for the first 55 %, of 64 px until 85 %, then whole pictures, fewer at a time."""
    window = 32 if progress < 0.55 else 64 if progress < 0.85 else IMAGE_SIZE
    if window == IMAGE_SIZE:
        return to_tensor([render(_busy_scene(rng)) for _ in range(max(1, batch // 4))])
    return to_tensor([_crop(_busy_scene(rng), window, rng) for _ in range(batch)])


def _crop(scene: Scene, window: int, rng: np.random.Generator) -> np.ndarray:
    """A window near the scene's first object."""
    thing = scene.things[0]
    spread = max(0.3 * window, 0.5 * IMAGE_SIZE * thing.radius)
    left, top = (
        int(np.clip(center * IMAGE_SIZE - window / 2 + rng.normal(0, spread), 0, IMAGE_SIZE - window))
        for center in (thing.x, thing.y)
    )
    return render(scene, left=left, top=top, window=window)


def _busy_scene(rng: np.random.Generator) -> Scene:
    """A scene for the autoencoder: often with arbitrary colours and more objects, sometimes a shaded background."""
    scene = sample_scene(rng)
    if rng.random() < 0.3:
        things = [replace(thing, rgb=_any_color(rng)) for thing in scene.things]
        things += [_any_thing(rng) for _ in range(int(rng.integers(0, 3)))]
        scene = replace(scene, background_rgb=_any_color(rng), things=tuple(things))
    return replace(scene, fade_to=_any_color(rng)) if rng.random() < 0.1 else scene


def _any_thing(rng: np.random.Generator) -> Thing:
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    return Thing("", shape, "", "", rng.random(), rng.random(), rng.uniform(0.08, 0.3), _any_color(rng))


def _any_color(rng: np.random.Generator) -> RGB:
    return rng.random(), rng.random(), rng.random()
