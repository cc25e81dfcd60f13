from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.domain.orders import Task
from serve.models import Denoiser
from serve.models.presets import RATIOS, auto, presets

SD = Denoiser(
    default_width=512,
    default_height=512,
    size_multiple=8,
    vae_scale_factor=8,
    latent_channels=4,
    in_channels=4,
    prediction_type="epsilon",
    process="diffusion",
    guidance="classifier_free",
    tasks=frozenset(Task),
    default_num_inference_steps=25,
    default_guidance_scale=5.0,
    default_strength=0.8,
)
SDXL = replace(SD, default_width=1024, default_height=1024)
SD3 = replace(SDXL, size_multiple=16, largest_side=3072)
SDXL_BUCKETS = [
    *[(512, 64 * side) for side in (32, 31, 30, 29)],
    *[(576, 64 * side) for side in (28, 27, 26)],
    *[(640, 64 * side) for side in (25, 24)],
    *[(704, 64 * side) for side in (23, 22, 21)],
    *[(768, 64 * side) for side in (21, 20)],
    *[(832, 64 * side) for side in (19, 18)],
    *[(896, 64 * side) for side in (18, 17)],
    *[(960, 64 * side) for side in (17, 16)],
    (1024, 1024),
]
"""Height and width of the upright ones in appendix I of the paper; the others are these lying down."""
families = st.sampled_from(["sd", "sdxl", "sdxl_refiner", "sd3", "flux", "pixart", "auraflow"])


@st.composite
def denoisers(draw: st.DrawFn) -> Denoiser:
    grid = draw(st.sampled_from([8, 16, 32]))
    side = draw(st.integers(min_value=max(64 // grid, 8), max_value=1536 // grid)) * grid
    largest = draw(st.none() | st.integers(min_value=side, max_value=4 * side))
    return replace(SD, default_width=side, default_height=side, size_multiple=grid, largest_side=largest)


def proportion(name: str) -> float:
    across, down = name.split(":")
    return int(across) / int(down)


def test_sizes_of_stable_diffusion_1() -> None:
    assert presets(SD, "sd") == {
        "1:1": (512, 512),
        "16:9": (912, 512),
        "9:16": (512, 912),
        "4:3": (680, 512),
        "3:4": (512, 680),
        "3:2": (768, 512),
        "2:3": (512, 768),
        "5:4": (640, 512),
        "4:5": (512, 640),
        "21:9": (1152, 512),
    }


def test_sizes_of_stable_diffusion_2_and_of_the_shipped_model() -> None:
    large = presets(replace(SD, default_width=768, default_height=768), "sd")
    assert (large["1:1"], large["16:9"], large["3:4"]) == ((768, 768), (1368, 768), (768, 1024))
    small = presets(replace(SD, default_width=128, default_height=128), "sd")
    assert (small["1:1"], small["3:2"], small["4:5"], small["16:9"]) == ((128, 128), (192, 128), (128, 160), (224, 128))


@pytest.mark.parametrize("family", ["sdxl", "sdxl_refiner", "sd3", "flux", "pixart", "auraflow"])
def test_a_megapixel_family_gets_sizes_that_sdxl_was_trained_on(family: str) -> None:
    trained = {*SDXL_BUCKETS, *((width, height) for height, width in SDXL_BUCKETS)}
    sizes = presets(SD3 if family == "sd3" else SDXL, family)
    assert sizes["16:9"] == (1344, 768)
    assert sizes["2:3"] == (832, 1216)
    assert all((height, width) in trained for width, height in sizes.values())


def test_half_the_side_is_half_of_each_size() -> None:
    """SDXL turbo."""
    half = presets(replace(SDXL, default_width=512, default_height=512), "sdxl")
    assert half == {name: (width // 2, height // 2) for name, (width, height) in presets(SDXL, "sdxl").items()}


@given(denoisers(), families, st.none() | st.integers(256, 4096))
def test_presets_are_on_the_grid_in_proportion_and_within_bounds(
    denoiser: Denoiser, family: str, max_side: int | None
) -> None:
    sizes = presets(denoiser, family, max_side=max_side)
    assert tuple(sizes) == RATIOS
    for name, (width, height) in sizes.items():
        assert width % denoiser.size_multiple == height % denoiser.size_multiple == 0
        assert max(width, height) <= min(max_side or width + height, denoiser.largest_side or width + height)
        if min(width, height) >= 5 * denoiser.size_multiple:
            assert width / height == pytest.approx(proportion(name), rel=0.08)


@given(denoisers(), families, st.integers(1, 8192), st.integers(1, 8192))
def test_auto_keeps_the_proportions_of_the_image(denoiser: Denoiser, family: str, width: int, height: int) -> None:
    across, down = auto(denoiser, family, width, height)
    assert across % denoiser.size_multiple == down % denoiser.size_multiple == 0
    assert max(across, down) <= (denoiser.largest_side or across + down)
    ratio = min(max(width / height, 0.25), 4.0)
    if min(across, down) >= 5 * denoiser.size_multiple:
        assert across / down == pytest.approx(ratio, rel=0.08)


def test_auto_takes_the_area_that_the_model_is_made_for() -> None:
    assert auto(SDXL, "sdxl", 4000, 3000) == (1152, 896)
    assert auto(SDXL, "flux", 3000, 3000) == (1024, 1024)
    assert auto(SDXL, "sdxl", 1, 8000) == auto(SDXL, "sdxl", 1000, 4000)
    assert auto(SD, "sd", 600, 400) == (624, 416)
    assert max(auto(SDXL, "sdxl", 4000, 1000, max_side=1024)) <= 1024
