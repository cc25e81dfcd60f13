"""What of a model's weights lies on the card, by rung."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from serve.memory.shapes import published
from serve.memory.weights import upcasts_vae, vae_dtype, weight_bytes
from serve.quantize import quantize
from serve.rungs import LADDER, Rung

SD15, SDXL, FLUX = (published()[name] for name in ("sd15", "sdxl", "flux-dev"))
WEIGHTS_CHANGE = (Rung.RESIDENT, Rung.INT8, Rung.INT4, Rung.OFFLOAD, Rung.SEQUENTIAL_OFFLOAD, Rung.CPU)


def test_all_weights_are_there_until_the_rungs_that_change_them() -> None:
    for rung in LADDER[: LADDER.index(Rung.INT8)]:
        assert weight_bytes(SD15, "float16", rung) == 2 * (SD15.parameters + SD15.vae_parameters)
        assert weight_bytes(SD15, "float32", rung) == 4 * (SD15.parameters + SD15.vae_parameters)


@pytest.mark.parametrize("name", sorted(published()))
def test_each_rung_that_changes_them_takes_less(name: str) -> None:
    sizes = [weight_bytes(published()[name], "bfloat16", rung) for rung in WEIGHTS_CHANGE]
    if name.startswith(("sd15", "sd21")):
        # A U-Net whose convolutions are most of it: offloading its attention alone leaves more than NF4 does.
        assert sizes[3] < sizes[0]
        del sizes[3]
    assert all(more > less for more, less in pairwise(sizes)), [round(size / 1e6) for size in sizes]


def test_flux_in_few_bits_is_what_it_is_known_to_be() -> None:
    """Some 12 GB in 8 bits and 6.7 GB in NF4, beside 24 GB in bfloat16."""
    found = [weight_bytes(FLUX, "bfloat16", rung) / 1e9 for rung in (Rung.RESIDENT, Rung.INT8, Rung.INT4)]
    assert found == pytest.approx([23.97, 12.5, 6.96], abs=0.05)


@pytest.mark.parametrize(("rung", "bits"), [(Rung.INT8, 8), (Rung.INT4, 4)])
def test_quantized_layers_take_what_is_said(rung: Rung, bits: int) -> None:
    """Against the layers themselves: the packed weights and their scales, beside what is shared by all layers."""
    layers = nn.ModuleList([nn.Linear(512, 2048, bias=False), nn.Linear(2048, 512, bias=False)])
    numbers = sum(each.numel() for each in layers.parameters())
    quantize([layers], bits, torch.device("cpu"))
    tensors = [tensor for name, tensor in layers.named_buffers() if name.endswith(("packed", "scales"))]
    alone = replace(SD15, parameters=numbers, linear=numbers, vae_parameters=0)
    assert sum(each.nbytes for each in tensors) == weight_bytes(alone, "float16", rung)


def test_the_vae_of_sdxl_is_kept_in_float32_where_it_would_overflow() -> None:
    assert vae_dtype(SDXL, "float16") == "float32"
    assert vae_dtype(SDXL, "bfloat16") == "bfloat16"
    assert vae_dtype(SD15, "float16") == "float16"
    grown = weight_bytes(SDXL, "float16", Rung.RESIDENT) - weight_bytes(SDXL, "bfloat16", Rung.RESIDENT)
    assert grown == 2 * SDXL.vae_parameters
    mended = replace(SDXL, vae={**SDXL.vae, "force_upcast": False})  # as sdxl-vae-fp16-fix
    assert not upcasts_vae(mended)
    assert weight_bytes(mended, "float16", Rung.RESIDENT) == weight_bytes(SDXL, "bfloat16", Rung.RESIDENT)


def test_offloading_keeps_two_blocks_or_one_layer_and_what_has_no_place_in_them() -> None:
    medium = published()["sd35-medium"]
    vae = 2 * medium.vae_parameters
    blocks = weight_bytes(medium, "float16", Rung.OFFLOAD) - vae
    assert blocks == 2 * (medium.outside + 2 * medium.largest_block)
    layer = weight_bytes(medium, "float16", Rung.SEQUENTIAL_OFFLOAD) - vae
    positions = 384 * 384 * 1536
    assert 2 * positions < layer < 2 * (positions + 9 * 1536 * 1536 + 9 * 1536 + 1)
