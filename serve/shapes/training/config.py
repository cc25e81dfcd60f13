"""Every number of the recipe in one frozen place. Schedules count steps, not seconds: a seed reproduces them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Sizes, rates and step counts. Batch sizes are per worker."""

    seed: int = 0
    workers: int = 2

    vae_channels: tuple[int, ...] = (16, 16, 32, 96)
    vae_steps: int = 4500
    vae_batch: int = 16
    vae_lr: float = 2e-3
    vae_muon_lr: float = 0.02
    kl_weight: float = 5e-4
    latent_noise: float = 0.10

    latents: int = 32_000

    text_width: int = 128
    text_layers: int = 2
    text_steps: int = 1200
    text_batch: int = 64

    unet_channels: tuple[int, ...] = (48, 64, 96)
    unet_steps: int = 6_500
    unet_batch: int = 32
    unet_lr: float = 1e-3
    unet_muon_lr: float = 0.015
    decay_share: float = 0.3
    text_tuned_share: float = 0.3
    text_lr_factor: float = 0.2
    late_mixed_share: float = 0.15
    ema: float = 0.999
    prompt_dropout: float = 0.1
    log_snr_mean: float = -0.7
    log_snr_std: float = 1.8

    polish_steps: int = 700
    polish_batch: int = 4
    polish_lr: float = 4e-4
    polish_muon_lr: float = 0.003


QUICK = Recipe(
    workers=1,
    vae_channels=(4, 4, 8, 16),
    vae_steps=30,
    latents=64,
    text_steps=10,
    unet_channels=(8, 16, 16),
    unet_steps=10,
    unet_batch=8,
    polish_steps=2,
    polish_batch=2,
)
"""Every stage in about a minute: it checks the machinery, its pictures mean nothing."""
