"""What a phase takes, against what is found: every tensor of published models counted, and small ones on the CPU's
allocator."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from serve.bench.footprint_report import (
    Row,
    allocated_step,
    allocated_vae,
    counted_steps,
    counted_vae,
    small_shapes,
    trained_dtype,
)
from serve.memory.activations import decode_bytes, encode_bytes, step_bytes
from serve.memory.shapes import published, shape_of
from serve.memory.terms import ModelShape
from serve.models import resolve
from serve.settings.pools import ModelSettings

WITHIN = 0.03
FEW = {"num_layers": 3, "num_single_layers": 2, "num_mmdit_layers": 2, "num_single_dit_layers": 2}
"""In the place of dozens, each of which takes what the one before it had."""
SHAPES = list(small_shapes())


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """One thread, and no word of diffusers' that layers are cast."""
    before, threads = diffusers.logging.get_verbosity(), torch.get_num_threads()
    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    yield
    diffusers.logging.set_verbosity(before)
    torch.set_num_threads(threads)


def shortened(shape: ModelShape) -> ModelShape:
    fewer = {name: number for name, number in FEW.items() if name in shape.denoiser}
    if "dual_attention_layers" in shape.denoiser:
        fewer["dual_attention_layers"] = [0, 1]  # type: ignore[assignment]
    if isinstance(shape.denoiser.get("transformer_layers_per_block"), list):
        fewer["transformer_layers_per_block"] = [1, 1, 1]  # type: ignore[assignment]
    return replace(shape, denoiser={**shape.denoiser, **fewer})


def hold(rows: Iterable[Row]) -> None:
    rows = list(rows)
    assert rows
    assert not [row for row in rows if abs(row.error) > WITHIN]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35-medium", "sd35-large", "flux-dev", "pixart-sigma", "auraflow"])
def test_a_step_is_what_is_counted(name: str) -> None:
    """At the model's own size, and at one where an SD 3 reads more text than image."""
    shape = shortened(published()[name])
    hold(counted_steps(shape, [(shape.default_width, shape.default_height), (256, 256)], trained_dtype(shape)))


def test_flux_in_float32_is_what_is_counted() -> None:
    """Nothing is converted in it, so that another moment is the worst."""
    hold(counted_steps(shortened(published()["flux-dev"]), [(512, 512)], "float32"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(published()))
def test_a_step_of_every_published_model_is_what_is_counted(name: str) -> None:
    shape = published()[name]
    sizes = [(shape.default_width, shape.default_height), (shape.default_width * 3 // 2, shape.default_height)]
    for dtype in (trained_dtype(shape), "float32"):
        hold(counted_steps(shape, sizes, dtype))


def test_the_vae_is_what_is_counted_whole_and_in_tiles() -> None:
    """SDXL's, in float32; tiles that divide the image, and that cut it off."""
    hold(counted_vae(published()["sdxl"], [(256, 256, 256), (256, 256, 128)]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux-dev"])
def test_published_vaes_are_what_is_counted_at_their_sizes(name: str) -> None:
    hold(counted_vae(published()[name], [(1024, 1024, 1024), (1536, 1024, 1024), (1280, 768, 512)]))


@pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])
def test_a_small_model_takes_what_is_said_of_the_cpu(shape: ModelShape) -> None:
    hold([allocated_step(shape, 256, 256)])


def test_the_shipped_model_takes_what_is_said_of_the_cpu() -> None:
    shape = shape_of(resolve(ModelSettings(source="shapes"), Path()))
    hold([allocated_step(shape, 256, 256), *allocated_vae(shape, [(256, 256, 256)])])


def test_a_vae_takes_what_is_said_of_the_cpu_whole_and_in_tiles() -> None:
    hold(allocated_vae(SHAPES[0], [(256, 256, 256), (256, 256, 128)]))


def test_lanes_and_dtypes_multiply_a_step() -> None:
    for shape in published().values():
        one = step_bytes(shape, "bfloat16", 1024, 1024, 1)
        # FLUX's tables of angles are for all lanes, and its worst moment is another in float32.
        assert 7.9 * one < step_bytes(shape, "bfloat16", 1024, 1024, 8) <= 8 * one
        assert 1.7 * one < step_bytes(shape, "float32", 1024, 1024, 1) <= 2 * one


def test_tiles_bound_what_the_vae_takes() -> None:
    sdxl = published()["sdxl"]
    whole = decode_bytes(sdxl, "float16", 1024, 1024, 1024)
    assert decode_bytes(sdxl, "float16", 1024, 1024, 512) < whole / 3.8
    assert (
        decode_bytes(sdxl, "float16", 4096, 4096, 1024) < 1.2 * whole < decode_bytes(sdxl, "float16", 1536, 1024, 2048)
    )


def test_a_bfloat16_vae_that_encodes_in_float32_has_room_for_both_its_weights() -> None:
    sdxl = published()["sdxl"]
    assert encode_bytes(sdxl, "bfloat16", 64, 64, 1024) == 4 * sdxl.vae_parameters
    beside = encode_bytes(sdxl, "bfloat16", 1024, 1024, 1024) - encode_bytes(sdxl, "float16", 1024, 1024, 1024)
    assert beside == 2 * sdxl.vae_parameters
