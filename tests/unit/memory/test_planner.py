"""The first rung that holds an image, and how far it reaches: on published models, and on whatever card."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.memory.classes import BUILT_IN
from serve.memory.footprint import footprint
from serve.memory.planner import TILES, USABLE, Plan, plan, smallest_class
from serve.memory.shapes import published
from serve.memory.terms import ModelShape
from serve.rungs import LADDER, MEANS, Rung, worse

UNETS = ("sd15", "sd21", "sdxl", "playground-v2.5")
QUANTIZED_OR_OFFLOADED = (Rung.INT8, Rung.INT4, Rung.OFFLOAD)

models = st.sampled_from(sorted(published())).map(lambda name: published()[name])
gigabytes = st.floats(0.3, 120).map(lambda size: size * 1e9)
rungs = st.sampled_from(LADDER)


def on(name: str, gpu_class: str, width: int | None = None, height: int | None = None) -> Plan:
    gpu = BUILT_IN[gpu_class]
    return plan(published()[name], gpu.memory_bytes, gpu.dtypes, width=width, height=height)


def held(shape: ModelShape, found: Plan, width: int, height: int, lanes: int | None = None) -> bool:
    lanes, tile = shape.lanes if lanes is None else lanes, found.tile_of(width * height)
    return footprint(shape, found.dtype, found.rung, width, height, lanes, tile).peak <= found.budget


def test_a_card_holds_what_it_is_bought_for() -> None:
    """The cells that the design promises, with everything on the card."""
    for name, gpu_class in (("sd15", "4gb"), ("sdxl", "11gb"), ("sd35-medium", "11gb")):
        found = on(name, gpu_class)
        assert (found.rung, found.fits) == (Rung.RESIDENT, True), name
        assert found.tile == TILES[0]  # the model's own size is decoded whole
    large = on("sdxl", "11gb", 1536, 1536)
    assert large.fits
    assert MEANS[large.rung].weights == "plain"
    assert MEANS[large.rung].offload == "none"
    assert large.tile**2 < 1536**2


@pytest.mark.parametrize("name", ["sd35-large", "flux-dev"])
def test_a_model_that_is_too_large_for_a_card_is_quantized_or_offloaded_there(name: str) -> None:
    assert on(name, "11gb").rung in QUANTIZED_OR_OFFLOADED
    assert on(name, "80gb").rung is Rung.RESIDENT


@pytest.mark.parametrize("name", sorted(published()))
def test_a_larger_class_never_takes_a_lower_rung(name: str) -> None:
    found = [on(name, each) for each in BUILT_IN]
    assert all(each.fits for each in found)
    for smaller, larger in pairwise(found):
        assert not worse(larger.rung, than=smaller.rung)


@given(models, gigabytes, rungs, rungs)
def test_the_plan_is_the_first_rung_that_holds_the_size(
    shape: ModelShape, memory: float, one: Rung, other: Rung
) -> None:
    best, worst = sorted((one, other), key=LADDER.index)
    found = plan(shape, memory, ("float16",), best=best, worst=worst)
    assert found.budget == int(USABLE * memory)
    assert not worse(best, than=found.rung)
    assert not worse(found.rung, than=worst)
    assert found.footprint == footprint(
        shape, "float16", found.rung, shape.default_width, shape.default_height, shape.lanes, found.tile
    )
    holds = found.footprint.peak <= found.budget
    assert found.fits is (holds and found.rung is not Rung.CPU)
    assert holds or found.rung is worst
    for rung in LADDER[LADDER.index(best) : LADDER.index(found.rung)]:
        size = shape.default_width, shape.default_height
        assert footprint(shape, "float16", rung, *size, shape.lanes).peak > found.budget


@given(models, gigabytes, st.integers(4, 32), st.integers(4, 32))
def test_what_is_said_to_be_held_is_held_and_no_more(shape: ModelShape, memory: float, wide: int, high: int) -> None:
    width, height = 64 * wide, 64 * high
    found = plan(shape, memory, ("float16",), width=width, height=height, worst=Rung.SEQUENTIAL_OFFLOAD)
    assert found.fits is (found.footprint.peak <= found.budget)
    assert (found.lanes >= shape.lanes) is found.fits
    if found.lanes:
        assert held(shape, found, width, height, found.lanes)
    if found.lanes < 256:
        assert not held(shape, found, width, height, found.lanes + 1)
    side = int(found.max_pixels**0.5)
    grid = shape.size_multiple
    if found.max_pixels and side <= 4096:
        assert held(shape, found, side // grid * grid, side // grid * grid)
        assert not held(shape, found, side + 3 * grid, side + 3 * grid)


@given(models, gigabytes, gigabytes)
def test_more_memory_holds_no_less_on_the_same_rung(shape: ModelShape, one: float, other: float) -> None:
    less, more = sorted((one, other))
    small, large = (plan(shape, memory, ("float16",)) for memory in (less, more))
    assert not worse(large.rung, than=small.rung)
    if large.rung is small.rung:
        assert large.max_pixels >= small.max_pixels
        assert large.lanes >= small.lanes


@given(models, st.sampled_from(list(BUILT_IN)), st.floats(0.25, 4))
def test_images_of_other_proportions_and_as_many_pixels_are_held_too(
    shape: ModelShape, gpu_class: str, ratio: float
) -> None:
    """`max_pixels` is found on squares. Rounding on each level of a U-Net makes the others at most a little larger than
    that, far within what USABLE leaves."""
    found = plan(shape, BUILT_IN[gpu_class].memory_bytes, BUILT_IN[gpu_class].dtypes)
    grid = shape.size_multiple
    width = max(int((found.max_pixels * ratio) ** 0.5) // grid, 1) * grid
    height = found.max_pixels // width // grid * grid
    if height:
        tile = found.tile_of(width * height)
        peak = footprint(shape, found.dtype, found.rung, width, height, shape.lanes, tile).peak
        assert peak <= found.budget * 1.02


def test_only_what_the_model_itself_would_tile_has_a_choice_of_tiles() -> None:
    shape = published()["sdxl"]
    for memory in range(4, 40):
        whole = plan(shape, memory * 1e9, ("float16",), worst=Rung.VAE_SLICING)
        assert whole.tile == TILES[0]
    tiles = [
        plan(shape, memory * 1e8, ("float16",), width=3072, height=3072, worst=Rung.RESIDENT)
        for memory in range(40, 240, 4)
    ]
    assert {each.tile for each in tiles if each.fits} == set(TILES)
    fitting = [each.tile for each in tiles if each.fits]
    assert fitting == sorted(fitting)


def test_slicing_attention_is_passed_over_where_it_saves_nothing() -> None:
    for memory in range(3, 30):
        for name in UNETS:
            found = plan(published()[name], memory * 1e9, ("float16",))
            if found.rung is Rung.ATTENTION_SLICING:
                tiled = footprint(published()[name], "float16", Rung.VAE_TILING, found.width, found.height, 2)
                assert found.footprint.peak < tiled.peak


def test_the_dtype_is_the_familys_own_where_the_card_has_it() -> None:
    assert on("sdxl", "24gb").dtype == "float16"
    assert on("flux-dev", "24gb").dtype == "bfloat16"
    assert on("flux-dev", "11gb").dtype == "float16"
    shape = published()["sd15"]
    assert plan(shape, 4e9, ("bfloat16", "float32")).dtype == "bfloat16"
    single = plan(shape, 24e9, ("float16",), dtype="float32")
    assert single.dtype == "float32"
    assert single.footprint.weights == 2 * plan(shape, 24e9, ("float16",)).footprint.weights


def test_the_cpu_is_the_last_rung_and_takes_nothing_of_the_card() -> None:
    found = plan(published()["flux-dev"], 1e8, ("float16",))
    assert (found.rung, found.fits, found.footprint.peak) == (Rung.CPU, False, 0)
    refused = plan(published()["flux-dev"], 1e8, ("float16",), worst=Rung.INT4)
    assert (refused.rung, refused.fits, refused.max_pixels, refused.lanes) == (Rung.INT4, False, 0, 0)


@given(models, st.integers(4, 40), st.integers(4, 40), rungs.filter(lambda rung: rung is not Rung.CPU))
def test_the_smallest_class_holds_it_and_none_below_does(shape: ModelShape, wide: int, high: int, worst: Rung) -> None:
    width, height = 64 * wide, 64 * high
    found = smallest_class(shape, width, height, worst=worst)
    below = [each for each in BUILT_IN.values() if found is None or each.memory_gb < found.memory_gb]
    for each in below:
        assert not plan(shape, each.memory_bytes, each.dtypes, width=width, height=height, worst=worst).fits
    if found is not None:
        assert plan(shape, found.memory_bytes, found.dtypes, width=width, height=height, worst=worst).fits


def test_the_smallest_class_may_be_looked_for_among_others_and_in_another_dtype() -> None:
    shape = published()["sdxl"]
    plain = {"worst": Rung.ATTENTION_SLICING}
    half, single = (smallest_class(shape, 1024, 1024, dtype=dtype, **plain) for dtype in ("float16", "float32"))
    assert half is not None
    assert single is not None
    assert half.memory_gb < single.memory_gb
    own = {"big": replace(BUILT_IN["80gb"], name="big"), "small": replace(BUILT_IN["4gb"], name="small")}
    assert smallest_class(shape, 1024, 1024, own, **plain) is own["big"]
    assert smallest_class(shape, 1024, 1024, {}) is None


@given(models, gigabytes, st.integers(8, 64), st.integers(8, 64))
def test_every_size_up_to_the_largest_has_tiles_that_hold_it(
    shape: ModelShape, memory: float, wide: int, high: int
) -> None:
    """What a placement lets in is held by the plan of the model's own size, with the side that `tile_of` says; and what
    the rung decodes whole stays whole."""
    found = plan(shape, memory, ("float16",), worst=Rung.SEQUENTIAL_OFFLOAD)
    width, height = 64 * wide, 64 * high
    pixels = width * height
    tile = found.tile_of(pixels)
    assert tile in [side for side, _ in found.tiles]
    if pixels <= MEANS[found.rung].tile ** 2:
        assert tile == MEANS[found.rung].tile
    if pixels <= found.max_pixels:
        peak = footprint(shape, found.dtype, found.rung, width, height, shape.lanes, tile).peak
        assert peak <= found.budget * 1.02
    own = plan(shape, memory, ("float16",), width=width, height=height, best=found.rung, worst=found.rung)
    assert own.tile == tile or not own.fits
    assert own.max_pixels == found.max_pixels


def test_sdxl_on_11_gb_is_drawn_whole_at_1024_and_in_tiles_at_1536_by_one_placement() -> None:
    found = on("sdxl", "11gb")
    assert found.tile_of(1024 * 1024) == 1024
    assert found.tile_of(1536 * 1536) < 1024
    assert found.max_pixels >= 1536 * 1536
    assert on("sdxl", "11gb", 1536, 1536).tile == found.tile_of(1536 * 1536)
