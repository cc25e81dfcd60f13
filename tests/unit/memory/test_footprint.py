"""The phases together: which rung takes what, and that no rung of the ladder takes more for what it gives up."""

from hypothesis import given
from hypothesis import strategies as st

from serve.memory.activations import decode_bytes, step_bytes
from serve.memory.footprint import footprint
from serve.memory.shapes import published
from serve.memory.terms import ModelShape
from serve.memory.weights import weight_bytes
from serve.rungs import LADDER, MEANS, Rung

MODELS = st.sampled_from(sorted(published())).map(lambda name: published()[name])
RUNGS = st.sampled_from([rung for rung in LADDER if MEANS[rung].on_card])
SIDES = st.integers(1, 128).map(lambda each: 16 * each)
LANES = st.integers(1, 8)
SDXL = published()["sdxl"]


def test_beside_the_steps_or_between_them() -> None:
    beside = footprint(SDXL, "float16", Rung.RESIDENT, 1024, 1024, 2)
    between = footprint(SDXL, "float16", Rung.VAE_SLICING, 1024, 1024, 2)
    assert beside.peak == beside.weights + beside.step + beside.decode
    assert between.peak == between.weights + between.decode  # the larger of the two by far
    assert (beside.weights, beside.step, beside.decode) == (between.weights, between.step, between.decode)


def test_the_rung_says_the_tile_unless_it_is_said() -> None:
    tiled = footprint(SDXL, "float16", Rung.VAE_TILING, 1024, 1024, 2)
    assert tiled.decode == decode_bytes(SDXL, "float16", 1024, 1024, 512)
    assert footprint(SDXL, "float16", Rung.RESIDENT, 1024, 1024, 2, 512).decode == tiled.decode


def test_quantized_rungs_have_room_for_one_layer_unpacked() -> None:
    plain, packed = (footprint(SDXL, "float16", rung, 1024, 1024, 2) for rung in (Rung.VAE_TILING, Rung.INT8))
    assert packed.step - plain.step == 2 * SDXL.largest_layer
    assert packed.weights < plain.weights


def test_the_cpu_rung_has_nothing_on_the_card() -> None:
    assert footprint(SDXL, "float16", Rung.CPU, 1024, 1024, 2).peak == 0


@given(MODELS, RUNGS, SIDES, SIDES, LANES)
def test_a_footprint_is_its_parts(shape: ModelShape, rung: Rung, width: int, height: int, lanes: int) -> None:
    found = footprint(shape, "float16", rung, width, height, lanes)
    assert found.weights == weight_bytes(shape, "float16", rung)
    assert found.step >= step_bytes(shape, "float16", width, height, lanes)
    assert found.peak >= found.weights + max(found.step, found.decode, found.encode)


@given(MODELS, RUNGS, SIDES, SIDES, LANES)
def test_more_of_anything_never_takes_less(shape: ModelShape, rung: Rung, width: int, height: int, lanes: int) -> None:
    one = footprint(shape, "bfloat16", rung, width, height, lanes)
    more = footprint(shape, "bfloat16", rung, width, height, lanes + 1)
    larger = footprint(shape, "bfloat16", rung, width + 16, height, lanes)
    assert more.step > one.step
    assert larger.step >= one.step


@given(MODELS, SIDES, SIDES)
def test_rungs_that_only_slice_take_no_more_than_the_one_before(shape: ModelShape, width: int, height: int) -> None:
    peaks = [footprint(shape, "float16", rung, width, height, shape.lanes).peak for rung in LADDER[:4]]
    assert peaks == sorted(peaks, reverse=True)
