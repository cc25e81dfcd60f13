"""The last stage: the decoder learns to draw what the U-Net means.

The encoder and the U-Net stay. Clean latents are noised moderately and denoised by the U-Net in one step; the
decoder learns to turn this estimate into the true picture. So it straightens the small, systematic errors that
sampled latents have and encoded ones have not (wavy edges, horned corners).
"""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from serve.shapes.captions import Phrase, caption
from serve.shapes.draw import render, sample_scene
from serve.shapes.training import parallel
from serve.shapes.training.config import Recipe
from serve.shapes.training.muon import Muon, wants_muon
from serve.shapes.training.text import PhraseEmbedder
from serve.shapes.training.tokenizer import load_tokenizer
from serve.shapes.training.unet import make_scheduler
from serve.shapes.training.vae import picture_loss, to_tensor

STAGE = 6
LOG_SNR_RANGE = (0.5, 5.0)
"""Noise levels of the estimates: at these the object is where it was, but its outline is the U-Net's."""
UNTOUCHED_SHARE = 0.4
"""Part of each batch that is decoded from the clean latents, so that plain decoding keeps its quality."""


def polish_decoder(recipe: Recipe, model: Path, out: Path) -> None:
    """Tune the decoder of the pipeline in ``model`` and save the autoencoder to ``out``; runs in every worker."""
    torch.manual_seed(1000 * recipe.seed + STAGE)
    vae = AutoencoderKL.from_pretrained(model / "vae").float()
    unet = UNet2DConditionModel.from_pretrained(model / "unet").float().eval().requires_grad_(False)
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder").float().eval().requires_grad_(False)
    embed = PhraseEmbedder(load_tokenizer(model / "tokenizer"), encoder)
    vae.requires_grad_(False)
    named = [(n, p) for n, p in vae.named_parameters() if n.startswith(("decoder.", "post_quant_conv."))]
    params = [p.requires_grad_(True) for _, p in named]
    muon = Muon(p for n, p in named if wants_muon(n, p))
    adam = torch.optim.AdamW(
        [p for n, p in named if not wants_muon(n, p)], recipe.polish_lr, betas=(0.9, 0.99), foreach=True
    )
    average = [p.detach().clone() for p in params]
    for step in range(recipe.polish_steps):
        rng = np.random.default_rng([recipe.seed, STAGE, step, parallel.rank()])
        torch.manual_seed(int(rng.integers(2**62)))
        images, latents = _estimates(recipe, vae, unet, embed, rng)
        loss = picture_loss(vae.decode(latents / vae.config.scaling_factor).sample, images)
        loss.backward()
        parallel.average_gradients(params)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        rate = min(1.0, (step + 1) / 50, 1.02 - step / recipe.polish_steps)
        for group in adam.param_groups:
            group["lr"] = recipe.polish_lr * rate
        adam.step()
        muon.step(recipe.polish_muon_lr * rate)
        vae.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - min(0.99, (1 + step) / (10 + step)))
        if step % 50 == 0:
            parallel.say(f"polish {step}/{recipe.polish_steps} loss {loss.item():.4f}")
    for param, mean in zip(params, average, strict=True):
        param.data.copy_(mean)
    if parallel.rank() == 0:
        vae.save_pretrained(out)


@torch.no_grad()
def _estimates(
    recipe: Recipe, vae: AutoencoderKL, unet: UNet2DConditionModel, embed: PhraseEmbedder, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Pictures, and latents that stand for them: the U-Net's estimates, and some clean ones."""
    words = random.Random(int(rng.integers(2**62)))
    scenes = [sample_scene(rng) for _ in range(recipe.polish_batch)]
    images = to_tensor([render(scene) for scene in scenes])
    clean = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
    alphas = make_scheduler().alphas_cumprod
    log_snr = (alphas / (1 - alphas)).log()
    wanted = torch.empty(len(scenes)).uniform_(*LOG_SNR_RANGE)
    steps = (log_snr[None, :] - wanted[:, None]).abs().argmin(1)
    signal, spread = (share[steps].sqrt().view(-1, 1, 1, 1) for share in (alphas, 1 - alphas))
    noisy = signal * clean + spread * torch.randn_like(clean)
    context = embed([Phrase(caption(scene, words, complete=True)) for scene in scenes])
    estimate = signal * noisy - spread * unet(noisy, steps, context).sample
    untouched = torch.rand(len(scenes), 1, 1, 1) < UNTOUCHED_SHARE
    return images, torch.where(untouched, clean, estimate)
