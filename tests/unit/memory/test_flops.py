"""The counted operations against torch's own count of the published architectures, and what tiles add."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from serve.bench.footprints import CLASSES, built, denoised
from serve.memory.flops import decoding, forward
from serve.memory.shapes import published
from serve.memory.terms import ModelShape

FEW_LAYERS = {"num_layers": 3, "num_single_layers": 2, "num_mmdit_layers": 2, "num_single_dit_layers": 2}
"""In the place of dozens, each of which costs the same."""
WITHIN = 0.001


def shortened(shape: ModelShape) -> ModelShape:
    fewer = {name: number for name, number in FEW_LAYERS.items() if name in shape.denoiser}
    if "dual_attention_layers" in shape.denoiser:
        fewer["dual_attention_layers"] = [0, 1]  # type: ignore[assignment]
    return replace(shape, denoiser={**shape.denoiser, **fewer})


def counted_step(shape: ModelShape, width: int, height: int, lanes: int) -> int:
    model = built(CLASSES[shape.family], shape.denoiser, "float32")
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoised(shape, "float32", width, height, lanes)(model)
    return int(counter.get_total_flops())


def counted_decoding(shape: ModelShape, width: int, height: int, tile: int | None = None) -> int:
    vae = built(AutoencoderKL, shape.vae, "float32")
    if tile is not None:
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // shape.vae_scale_factor
    latents = torch.empty(1, shape.vae["latent_channels"], height // 8, width // 8, device="meta")
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(latents)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", ["sd15", "sd35-medium", "flux-dev", "pixart-sigma", "auraflow"])
def test_a_step_is_what_torch_counts(name: str) -> None:
    shape = shortened(published()[name])
    assert forward(shape, 512, 768).flops * 2 == pytest.approx(counted_step(shape, 512, 768, 2), rel=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(published()))
def test_a_step_of_every_published_model_is_what_torch_counts(name: str) -> None:
    shape = published()[name]
    for width, height in ((shape.default_width, shape.default_height), (832, 1216)):
        counted = counted_step(shape, width, height, 1)
        assert forward(shape, width, height).flops == pytest.approx(counted, rel=WITHIN)


def test_a_decoding_is_what_torch_counts_whole_and_in_tiles() -> None:
    shape = published()["sdxl"]
    assert decoding(shape, 768, 512, 1024).flops == pytest.approx(counted_decoding(shape, 768, 512), rel=WITHIN)
    in_tiles = decoding(shape, 576, 512, 384).flops
    assert in_tiles == pytest.approx(counted_decoding(shape, 576, 512, 384), rel=WITHIN)
    # A tile attends within itself, so what tiles cost is their overlap less that; sizes up to a tile cost nothing.
    assert in_tiles > decoding(shape, 576, 512, 1024).flops
    assert decoding(shape, 512, 512, 512) == decoding(shape, 512, 512, 1024)
