"""What differs between model families: which parts to load, how the denoiser is called, how latents become pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers import schedulers as diffusers_schedulers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from serve.errors import OperatorError
from serve.models import ModelFolder

MENDED = {"steps_offset": 1, "clip_sample": False}


class SdFamily:
    """Stable Diffusion 1.x and 2.x: a U-Net over 4-channel latents with cross-attention to one text encoder.

    Loads U-Net, VAE and scheduler configuration of a diffusers folder; never a text encoder.

    Owns: the weights on the device.
    """

    def __init__(self, model: ModelFolder, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        assert model.denoiser is not None, "a model for text only is never drawn with"
        self.latent_channels = model.denoiser.latent_channels
        self.vae_scale_factor = model.denoiser.vae_scale_factor
        try:
            self._unet = _load(UNet2DConditionModel, model.path / "unet", dtype).to(device)
            self._vae = _load(AutoencoderKL, model.path / "vae", dtype).to(device)
            self._scheduler_class, self._scheduler_config = _scheduler(model.path)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise OperatorError(f"model.source: {model.name} can't be loaded: {reason}", "model.source") from error

    def forwards(self, num_inference_steps: int) -> int:
        """Forward passes of that many steps: more, with samplers that look twice (PNDM, Heun)."""
        return len(self.new_scheduler(num_inference_steps).timesteps)

    def new_scheduler(self, num_inference_steps: int) -> Any:
        """A diffusers scheduler of its own for one image: multi-step samplers keep a history of their latents."""
        scheduler = self._scheduler_class.from_config(self._scheduler_config)
        scheduler.set_timesteps(num_inference_steps, device=self.device)
        return scheduler

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The denoiser's output, (B, C, H, W), for latents (B, C, H, W), timesteps (B,), context (B, tokens, width)."""
        out: torch.Tensor = self._unet(latents, timesteps, encoder_hidden_states=context, return_dict=False)[0]
        return out

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H * f, W * f), float32 in about [-1, 1], on the CPU, from final latents (B, C, H, W)."""
        config = self._vae.config
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        pixels: torch.Tensor = self._vae.decode(latents, return_dict=False)[0]
        return pixels.float().cpu()


def _load(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The part in eval mode. ValueError for a tensor that is missing: diffusers would fill it with random numbers."""
    part, report = cls.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder.name} has no tensor {missing[0]} ({len(missing)} missing)")
    return part.eval()


def _scheduler(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The sampler's class and configuration, mended as `StableDiffusionPipeline`'s constructor mends old ones."""
    name = DiffusionPipeline.load_config(folder, local_files_only=True)["scheduler"][1]
    cls = getattr(diffusers_schedulers, name, None)
    if cls is None:
        raise ValueError(f"scheduler {name} is not one of diffusers'")
    written = cls.load_config(folder / "scheduler", local_files_only=True)
    config = dict(cls.from_config(written).config)
    config.pop("_use_default_values", None)  # what it names would fall back to the class's default once more
    return cls, config | {name: value for name, value in MENDED.items() if name in config}
