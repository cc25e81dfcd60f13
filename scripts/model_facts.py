"""What serve/memory/published.json says of published models: their configurations, and what diffusers makes of them;
and serve/memory/defaults.json of diffusers' classes: what they take for fields that a configuration lacks.

    python scripts/model_facts.py            write the tables
    python scripts/model_facts.py --check    exit with 1 where they are not what diffusers makes

Weights are not needed: the classes are built on torch's meta device, which allocates nothing, and their tensors are
counted. The configurations are those of the models' repositories, without what has no effect on memory or time.
"""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

from diffusers import AutoencoderKL

from serve.bench.footprints import CLASSES, built
from serve.memory.shapes import DEFAULTS, TABLE, counted

_SD = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
_SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_REFINER = {
    **_SDXL,
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 4,
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
_SD35 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
_MEDIUM = {
    **_SD35,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
}
_LARGE = {
    **_SD35,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
}
_FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
_PIXART = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "attention_bias": True,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}
_AURAFLOW = {
    "sample_size": 64,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_mmdit_layers": 4,
    "num_single_dit_layers": 32,
    "num_attention_heads": 12,
    "attention_head_dim": 256,
    "joint_attention_dim": 2048,
    "caption_projection_dim": 3072,
    "pos_embed_max_size": 9216,
}
_KL = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "force_upcast": True,
}
_KL16 = {**_KL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, int, int]] = {
    "sd15": ("sd", _SD, _KL, 512, 8, 77),
    "sd21": (
        "sd",
        {**_SD, "sample_size": 96, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024}
        | {"use_linear_projection": True},
        _KL,
        768,
        8,
        77,
    ),
    "sdxl": ("sdxl", _SDXL, _KL, 1024, 8, 77),
    "sdxl-refiner": ("sdxl_refiner", _REFINER, _KL, 1024, 8, 77),
    "playground-v2.5": ("sdxl", _SDXL, _KL, 1024, 8, 77),
    "sd35-medium": ("sd3", _MEDIUM, _KL16, 1024, 16, 333),
    "sd35-large": ("sd3", _LARGE, _KL16, 1024, 16, 333),
    "flux-dev": ("flux", _FLUX, _KL16, 1024, 16, 512),
    "flux-schnell": ("flux", {**_FLUX, "guidance_embeds": False}, _KL16, 1024, 16, 256),
    "pixart-sigma": ("pixart", _PIXART, _KL, 1024, 16, 300),
    "auraflow": ("auraflow", _AURAFLOW, _KL, 1024, 16, 256),
}
"""Name -> family, denoiser, VAE, side in pixels as trained, grid of sides, tokens of the text."""


def facts(family: str, denoiser: dict[str, Any], vae: dict[str, Any], side: int, grid: int, text: int) -> Any:
    tensors = built(CLASSES[family], denoiser, "float32").state_dict()
    vae_tensors = built(AutoencoderKL, vae, "float32").state_dict()
    return {
        "family": family,
        **counted({name: tuple(each.shape) for name, each in tensors.items()}),
        "vae_parameters": sum(each.numel() for each in vae_tensors.values()),
        "vae_scale_factor": 2 ** (len(vae["block_out_channels"]) - 1),
        "size_multiple": grid,
        "default_width": side,
        "default_height": side,
        "guided": family != "flux",
        "text_tokens": text,
        "denoiser": denoiser,
        "vae": vae,
    }


def table() -> str:
    return json.dumps({name: facts(*about) for name, about in MODELS.items()}, indent=1) + "\n"


def defaults() -> str:
    classes = {each.__name__: each for each in (*CLASSES.values(), AutoencoderKL)}
    fields = {name: inspect.signature(cls.__init__).parameters.values() for name, cls in sorted(classes.items())}
    told = {
        name: {each.name: each.default for each in own if each.default is not each.empty}
        for name, own in fields.items()
    }
    return json.dumps(told, indent=1) + "\n"


def main() -> int:
    tables = {TABLE: table(), DEFAULTS: defaults()}
    for file, text in tables.items():
        if "--check" not in sys.argv[1:]:
            file.write_text(text, encoding="utf-8")
        elif file.read_text(encoding="utf-8") != text:
            print(f"serve/memory/{file.name} is not what diffusers makes; run scripts/model_facts.py", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
