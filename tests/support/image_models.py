"""Small whole models with random weights, in the diffusers layout: what `text_models` builds, and a denoiser, a VAE and
a scheduler to it, of the stock classes. Widths differ from part to part, and no parameter is left at 0 or 1.

Latents are `FACTOR` times smaller than the image on each side.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    LCMScheduler,
    PixArtTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from support import text_models

FACTOR = 4
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CROSS = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")


def sd_model(path: Path, seed: int = 0, *, in_channels: int = 4, prediction_type: str = "epsilon") -> Path:
    """Stable Diffusion 1.x; 9 channels are an inpainting U-Net, `v_prediction` is 2.1's."""
    text_models.sd_folder(path, seed)
    unet = UNet2DConditionModel(
        **_unet(in_channels), attention_head_dim=4, cross_attention_dim=text_models.CLIP_L["hidden_size"]
    )
    scheduler = DDIMScheduler(
        **BETAS, prediction_type=prediction_type, set_alpha_to_one=False, steps_offset=1, clip_sample=False
    )
    pipeline = "StableDiffusionInpaintPipeline" if in_channels == 9 else "StableDiffusionPipeline"
    return _finish(path, seed, "unet", unet, vae(seed), scheduler, pipeline)


def lcm_model(path: Path, seed: int = 0) -> Path:
    """A latent consistency model, whose U-Net is told the guidance scale that it imitates."""
    sd_model(path, seed)
    config = UNet2DConditionModel.load_config(path / "unet") | {"time_cond_proj_dim": 16}
    unet = UNet2DConditionModel.from_config(config)
    scheduler = LCMScheduler(**BETAS, original_inference_steps=50, clip_sample=False, set_alpha_to_one=True)
    _finish(path, seed, "unet", unet, vae(seed), scheduler, "LatentConsistencyModelPipeline")
    file = path / "model_index.json"
    index = json.loads(file.read_text())
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    file.write_text(json.dumps(index, indent=2))
    return path


def playground_model(path: Path, seed: int = 0) -> Path:
    """Playground v2.5: an SDXL that was trained on noise levels (EDM), its latents with a mean and a spread."""
    sdxl_model(path, seed)
    unet = UNet2DConditionModel.from_pretrained(path / "unet")
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    autoencoder = vae(
        seed,
        scaling_factor=0.5,
        latents_mean=[-1.6574, 1.886, -1.383, 2.5155],
        latents_std=[8.4927, 5.9022, 6.5498, 5.2299],
    )
    return _finish(path, seed, "unet", unet, autoencoder, scheduler, "StableDiffusionXLPipeline")


def sdxl_model(path: Path, seed: int = 0, *, in_channels: int = 4) -> Path:
    """SDXL, whose U-Net reads the pooled text and six time ids too."""
    text_models.sdxl_folder(path, seed)
    width = text_models.CLIP_L["hidden_size"] + text_models.OPENCLIP["hidden_size"]
    unet = UNet2DConditionModel(
        **_unet(in_channels),
        attention_head_dim=(2, 4),
        cross_attention_dim=width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=text_models.OPENCLIP_PROJECTION + 6 * 8,
        transformer_layers_per_block=(1, 2),
    )
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    pipeline = "StableDiffusionXLInpaintPipeline" if in_channels == 9 else "StableDiffusionXLPipeline"
    return _finish(path, seed, "unet", unet, vae(seed, scaling_factor=0.13025), scheduler, pipeline)


def sdxl_refiner_model(path: Path, seed: int = 0) -> Path:
    """SDXL's refiner, whose U-Net reads one text encoder, its pooled text and five time ids."""
    text_models.sdxl_refiner_folder(path, seed)
    unet = UNet2DConditionModel(
        **_unet(4),
        attention_head_dim=(2, 4),
        cross_attention_dim=text_models.OPENCLIP["hidden_size"],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=text_models.OPENCLIP_PROJECTION + 5 * 8,
        transformer_layers_per_block=2,
    )
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    autoencoder = vae(seed, scaling_factor=0.13025)
    return _finish(path, seed, "unet", unet, autoencoder, scheduler, "StableDiffusionXLImg2ImgPipeline")


def sd3_model(path: Path, seed: int = 0, *, with_t5: bool = True, dual_attention: bool = True) -> Path:
    """SD 3.5 Medium (with dual attention) or SD 3."""
    text_models.sd3_folder(path, seed, with_t5=with_t5)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=text_models.T5["d_model"],
        caption_projection_dim=48,
        pooled_projection_dim=text_models.CLIP_L_PROJECTION + text_models.OPENCLIP_PROJECTION,
        out_channels=8,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1) if dual_attention else (),
        qk_norm="rms_norm" if dual_attention else None,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    autoencoder = vae(seed, latent_channels=8, scaling_factor=1.5305, shift_factor=0.0609)
    return _finish(path, seed, "transformer", transformer, autoencoder, scheduler, "StableDiffusion3Pipeline")


def flux_model(path: Path, seed: int = 0, *, guidance_embeds: bool = True) -> Path:
    """FLUX.1 dev, or schnell without the guidance's embedding."""
    text_models.flux_folder(path, seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=text_models.T5["d_model"],
        pooled_projection_dim=text_models.CLIP_L["hidden_size"],
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if guidance_embeds else 1.0,
        use_dynamic_shifting=guidance_embeds,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    autoencoder = vae(seed, latent_channels=8, scaling_factor=0.3611, shift_factor=0.1159)
    return _finish(path, seed, "transformer", transformer, autoencoder, scheduler, "FluxPipeline")


def pixart_model(path: Path, seed: int = 0, *, sigma: bool = True) -> Path:
    """PixArt-Sigma; or Alpha of 1024 pixels, which alone is told the image's size. Both predict a variance too."""
    text_models.pixart_folder(path, seed, sigma=sigma)
    transformer = PixArtTransformer2DModel(
        # 128 is what the pipeline knows the models of 1024 pixels by; positions of other sizes are computed.
        sample_size=16 if sigma else 128,
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=48,
        caption_channels=text_models.T5["d_model"],
    )
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    pipeline = "PixArtSigmaPipeline" if sigma else "PixArtAlphaPipeline"
    return _finish(path, seed, "transformer", transformer, vae(seed, scaling_factor=0.13025), scheduler, pipeline)


def auraflow_model(path: Path, seed: int = 0) -> Path:
    """AuraFlow."""
    text_models.auraflow_folder(path, seed)
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=text_models.T5["d_model"],
        caption_projection_dim=48,
        pos_embed_max_size=256,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    autoencoder = vae(seed, scaling_factor=0.13025)
    return _finish(path, seed, "transformer", transformer, autoencoder, scheduler, "AuraFlowPipeline")


def vae(seed: int, *, latent_channels: int = 4, scaling_factor: float = 0.18215, **options: Any) -> AutoencoderKL:
    """Three levels, so that images are four times larger than latents."""
    torch.manual_seed(seed + 17)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 24),
        norm_num_groups=4,
        latent_channels=latent_channels,
        scaling_factor=scaling_factor,
        sample_size=64,
        **options,
    )


def tiny_vae(path: Path, seed: int = 0, *, latent_channels: int = 4) -> Path:
    """An `AutoencoderTiny` (TAESD) with the same factor."""
    torch.manual_seed(seed + 29)
    model = AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    model.save_pretrained(path)
    return path


BUILDERS: dict[str, Callable[..., Path]] = {
    "sd": sd_model,
    "sdxl": sdxl_model,
    "sd3": sd3_model,
    "flux": flux_model,
    "sdxl_refiner": sdxl_refiner_model,
    "pixart": pixart_model,
    "auraflow": auraflow_model,
}


def _unet(in_channels: int) -> dict[str, Any]:
    down, up = CROSS
    return {
        "sample_size": 16,
        "in_channels": in_channels,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 24),
        "norm_num_groups": 4,
        "down_block_types": down,
        "up_block_types": up,
    }


def _finish(
    path: Path,
    seed: int,
    part: str,
    denoiser: torch.nn.Module,
    autoencoder: AutoencoderKL,
    scheduler: SchedulerMixin,
    pipeline: str,
) -> Path:
    text_models.fill(denoiser, seed)  # type: ignore[arg-type]
    denoiser.save_pretrained(path / part)  # type: ignore[operator]
    autoencoder.save_pretrained(path / "vae")
    scheduler.save_pretrained(path / "scheduler")
    file = path / "model_index.json"
    index = json.loads(file.read_text())
    index |= {"_class_name": pipeline, "scheduler": ["diffusers", type(scheduler).__name__]}
    file.write_text(json.dumps(index, indent=2))
    return path
