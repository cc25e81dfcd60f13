"""Orders become complete requests, or are refused by the name of the field at fault."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given as given_
from hypothesis import strategies as st

from serve.domain.orders import MaskedContent, ResizeMode, Task
from serve.errors import InvalidRequest, ModelNotFound
from serve.jobs.reading import REQUEST
from serve.models import SHIPPED, Denoiser, ModelFolder, check_folder
from serve.orders import NewImage, complete
from serve.placements import Fleet, Placement
from serve.settings.orders import LimitSettings
from serve.settings.pools import DiffusionSettings
from serve.starting import Given

SHAPES = check_folder(SHIPPED, "shapes")
LIMITS = LimitSettings()
ALL = frozenset(Task)


def model(name: str = "shapes", family: str = "sd", **facts: Any) -> ModelFolder:
    assert SHAPES.denoiser is not None
    return replace(SHAPES, name=name, family=family, denoiser=replace(SHAPES.denoiser, **facts))


def fleet(*models: ModelFolder, max_pixels: int = 2048**2, **settings: Any) -> Fleet:
    own = DiffusionSettings(**settings)
    return Fleet(
        tuple(
            Placement(name=each.name, model=each.name, gpu_class=None, settings=own, max_pixels=max_pixels)
            for each in models
        )
    )


def order(drawn: ModelFolder = SHAPES, place: Fleet | None = None, **fields: Any) -> Any:
    """Completed by a server with that one model. `image` and `mask` are the sizes of what they stand for."""
    found = {name: Given(f"{'0' * 32}/{name}.png", *fields[name]) for name in ("image", "mask") if name in fields}
    new = NewImage(**{"prompt": "a red circle"} | fields | dict.fromkeys(found, "a file"))
    return complete(new, {drawn.name: drawn}, place or fleet(drawn), LIMITS, found)


def refused(param: str, drawn: ModelFolder = SHAPES, place: Fleet | None = None, **fields: Any) -> str:
    with pytest.raises(InvalidRequest) as error:
        order(drawn, place, **fields)
    assert error.value.param == param
    assert param in error.value.message
    return error.value.message


def denoiser(drawn: ModelFolder) -> Denoiser:
    assert drawn.denoiser is not None
    return drawn.denoiser


def test_what_an_order_does_not_say_is_what_the_model_is_made_for() -> None:
    drawn = model(default_num_inference_steps=7, default_guidance_scale=2.5)
    request = order(drawn)
    assert (request.num_inference_steps, request.guidance_scale, request.true_cfg_scale) == (7, 2.5, None)
    assert (request.width, request.height) == (denoiser(drawn).default_width, denoiser(drawn).default_height)
    assert (request.scheduler, request.strength, request.image, request.task) == (None, None, None, Task.TXT2IMG)
    assert 0 <= request.seed < 2**32


def test_several_models() -> None:
    models = {name: model(name) for name in ("first", "second")}
    place = fleet(*models.values())
    assert complete(NewImage(prompt="a"), models, place, LIMITS).model == "first"
    assert complete(NewImage(prompt="a", model="second"), models, place, LIMITS).model == "second"
    with pytest.raises(ModelNotFound, match="'first', 'second'"):
        complete(NewImage(prompt="a", model="third"), models, place, LIMITS)
    with pytest.raises(ModelNotFound, match="only encodes text"):
        complete(NewImage(prompt="a"), {}, Fleet(()), LIMITS)


def test_a_size_off_the_grid_is_refused_with_the_nearest_good_ones() -> None:
    told = refused("width", model(size_multiple=16), width=120, height=71)
    assert "width 120 is not a multiple of 16; the nearest are 112 and 128" in told
    assert "height 71 is not a multiple of 16; the nearest are 64 and 80" in told
    assert "nearest are 2040 and 2048" in refused("height", height=2047)
    for wrong in (7, 0, -8, 2056, 10**30):
        refused("width", width=wrong)
    refused("height", model(largest_side=512), height=520)


@given_(width=st.integers(1, 2048), height=st.integers(1, 2048), grid=st.sampled_from([8, 16, 64]))
def test_a_size_is_rounded_to_the_nearest_only_where_asked(width: int, height: int, grid: int) -> None:
    request = order(model(size_multiple=grid), width=width, height=height, round_size=True)
    for asked, got in ((width, request.width), (height, request.height)):
        assert got % grid == 0
        assert got > 0
        others = [side for side in (got - grid, got + grid) if side > 0]
        assert all((abs(got - asked), got) < (abs(side - asked), side) for side in others)


def test_aspect_ratios() -> None:
    wide = order(aspect_ratio="16:9")
    assert wide.width > wide.height
    square = order(aspect_ratio="1:1")
    assert (square.width, square.height) == (denoiser(SHAPES).default_width, denoiser(SHAPES).default_height)
    assert (order(aspect_ratio="Auto").width, order(aspect_ratio="Auto").height) == (square.width, square.height)
    auto = order(aspect_ratio="Auto", image=(900, 1600))
    assert auto.width < auto.height
    assert "16:9" in refused("aspect_ratio", aspect_ratio="2:7")
    assert "one or the other" in refused("aspect_ratio", aspect_ratio="1:1", height=64)
    with pytest.raises(InvalidRequest) as error:
        order(place=fleet(SHAPES, max_pixels=64), aspect_ratio="1:1")
    assert error.value.param == "aspect_ratio"


def test_a_size_that_no_gpu_holds_is_refused_with_one_that_is_held() -> None:
    place = fleet(SHAPES, max_pixels=128 * 128)
    assert order(place=place, width=256, height=64).pixels == 128 * 128
    with pytest.raises(InvalidRequest, match="16384") as error:
        order(place=place, width=256, height=72)
    assert error.value.param == "width"


def test_an_image_gives_its_own_size_rounded_down() -> None:
    request = order(image=(79, 130))
    assert (request.width, request.height) == (72, 128)
    assert (order(image=(79, 130), height=64).width, order(image=(79, 130), height=64).height) == (72, 64)
    refused("height", image=(79, 130), height=65)
    assert "say width and height" in refused("image", image=(3000, 100))
    refused("image", model(size_multiple=64), image=(100, 63))


def test_strength() -> None:
    drawn = model(default_strength=0.4)
    assert order(drawn, image=(64, 64)).strength == 0.4
    assert order(drawn, image=(64, 64), mask=(64, 64)).strength == 1.0
    assert order(drawn, image=(64, 64), strength=1).strength == 1.0
    for wrong in (0, -0.5, 1.0001, float("nan")):
        refused("strength", image=(64, 64), strength=wrong)
    assert "leaves none" in refused("strength", image=(64, 64), strength=0.19, num_inference_steps=5)
    assert order(image=(64, 64), strength=0.2, num_inference_steps=5).strength == 0.2
    refused("strength", strength=0.5)


def test_an_image_may_say_alone_what_is_drawn() -> None:
    assert order(prompt="", image=(64, 64)).prompt == ""
    refused("prompt", prompt="")


def test_an_image_and_its_mask() -> None:
    request = order(image=(64, 64), mask=(64, 64))
    assert request.task is Task.INPAINT
    assert (request.image, request.mask) == (f"{'0' * 32}/image.png", f"{'0' * 32}/mask.png")
    assert "64 x 72" in refused("mask", image=(64, 64), mask=(64, 72))
    refused("mask", mask=(64, 64))


def test_what_a_mask_means() -> None:
    pictures: dict[str, Any] = {"image": (64, 64), "mask": (64, 64)}
    assert order(**pictures).mask_blur is None
    assert [order(**pictures, mask_blur=blur).mask_blur for blur in (0, 2.5, 64)] == [0.0, 2.5, 64.0]
    for wrong in (-0.1, 64.5, float("nan")):
        refused("mask_blur", **pictures, mask_blur=wrong)
    refused("mask_blur", image=(64, 64), mask_blur=0)
    refused("mask_blur", mask_blur=4)


def test_only_what_is_around_the_mask_is_drawn() -> None:
    """At the model's own size, whatever the picture's is; all answers are no larger than one picture may be."""
    large: dict[str, Any] = {"image": (3000, 2000), "mask": (3000, 2000)}
    request = order(**large, padding_mask_crop=32)
    assert (request.width, request.height) == (128, 128)
    assert (request.padding_mask_crop, request.mask_blur) == (32, 4.0)
    assert order(**large, padding_mask_crop=0, mask_blur=0, width=64).mask_blur == 0.0
    for wrong in (-1, 5000):
        refused("padding_mask_crop", **large, padding_mask_crop=wrong)
    refused("padding_mask_crop", image=(64, 64), padding_mask_crop=0)
    refused("padding_mask_crop", padding_mask_crop=0)
    refused("resize_mode", **large, padding_mask_crop=0, resize_mode=ResizeMode.CROP)
    assert "3000 x 2000" in refused("num_images", **large, padding_mask_crop=0, num_images=4)
    huge: dict[str, Any] = {"image": (16384, 64), "mask": (16384, 64), "padding_mask_crop": 0}
    refused("output_format", **huge, output_format="webp")


def test_what_is_under_a_mask_wants_one() -> None:
    for content in MaskedContent:
        assert order(image=(64, 64), mask=(64, 64), masked_content=content).masked_content is content
    refused("masked_content", image=(64, 64), masked_content=MaskedContent.FILL)
    assert order(masked_content=MaskedContent.ORIGINAL).masked_content is MaskedContent.ORIGINAL


@pytest.mark.parametrize("mode", [ResizeMode.CROP, ResizeMode.FILL])
def test_what_is_asked_of_pictures_wants_them(mode: ResizeMode) -> None:
    with_both = order(image=(64, 64), mask=(64, 64), mask_invert=True, resize_mode=mode)
    assert replace(with_both, seed=0) == replace(order(image=(64, 64), mask=(64, 64)), seed=0)  # done at the door
    assert order(image=(64, 64), resize_mode=mode).task is Task.IMG2IMG
    refused("resize_mode", resize_mode=mode)
    refused("mask_invert", image=(64, 64), mask_invert=True)
    refused("mask_invert", mask_invert=True)


def test_variations_are_of_one_seed() -> None:
    request = order(seed=7, variation_seed=2**32 - 3, variation_strength=0.25, num_images=3)
    assert [request.seed_of(i) for i in range(3)] == [7, 7, 7]
    assert [request.variation_seed_of(i) for i in range(3)] == [2**32 - 3, 2**32 - 2, 2**32 - 1]
    plain = order(seed=7, variation_seed=9, num_images=3)
    assert (plain.variation_seed, plain.variation_strength) == (None, 0.0)
    assert [plain.seed_of(i) for i in range(3)] == [7, 8, 9]
    assert plain.variation_seed_of(1) is None
    drawn = {order(seed=7, variation_strength=1).variation_seed for _ in range(3)}
    assert len(drawn) > 1
    assert all(seed is not None and 0 <= seed < 2**32 for seed in drawn)
    for wrong in (-0.1, 1.1, float("nan")):
        refused("variation_strength", variation_strength=wrong)
    refused("variation_seed", variation_seed=2**32 - 1, num_images=2)
    refused("variation_seed", variation_seed=-1)


def test_a_record_from_before_a_field_has_its_default() -> None:
    request = order(image=(64, 64), mask=(64, 64))
    record = json.loads(REQUEST.dump_json(request))
    for name in ("mask_blur", "padding_mask_crop", "masked_content", "variation_seed", "variation_strength"):
        del record[name]
    assert REQUEST.validate_json(json.dumps(record)) == request


@pytest.mark.parametrize(
    ("tasks", "fields", "param"),
    [
        ({Task.INPAINT}, {}, "image"),
        ({Task.INPAINT}, {"image": (64, 64)}, "mask"),
        ({Task.IMG2IMG}, {}, "image"),
        ({Task.IMG2IMG}, {"image": (64, 64), "mask": (64, 64)}, "mask"),
        ({Task.TXT2IMG}, {"image": (64, 64)}, "image"),
        ({Task.TXT2IMG}, {"image": (64, 64), "mask": (64, 64)}, "image"),
    ],
)
def test_what_a_model_can_t_do_is_refused_with_what_it_can(tasks: set[Task], fields: Any, param: str) -> None:
    told = refused(param, model(tasks=frozenset(tasks)), **fields)
    words = {Task.INPAINT: "an image and a mask", Task.IMG2IMG: "an image", Task.TXT2IMG: "text alone"}
    assert told.endswith(words[next(iter(tasks))])


def test_samplers_are_those_of_the_model_s_kind() -> None:
    assert order(scheduler="euler_a").scheduler == "euler_a"
    assert "dpmpp_2m_karras" in refused("scheduler", scheduler="flow_euler")
    assert "flow_euler" in refused("scheduler", model(process="flow"), scheduler="euler_a")


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_consistency_samplers_make_few_steps(name: str) -> None:
    assert order(scheduler=name, num_inference_steps=50).num_inference_steps == 50
    assert "at most 50" in refused("num_inference_steps", scheduler=name, num_inference_steps=51)


def test_true_cfg_scale_is_for_models_whose_guidance_is_an_input() -> None:
    refused("true_cfg_scale", true_cfg_scale=2.0)
    flux = model(family="flux", guidance="embedded", default_guidance_scale=3.5)
    assert (order(flux).true_cfg_scale, order(flux).guided, order(flux).guidance_scale) == (1.0, False, 3.5)
    assert order(flux, true_cfg_scale=4).guided
    refused("true_cfg_scale", flux, true_cfg_scale=51)
    lcm = model(guidance="embedded")
    assert order(lcm).guided is False
    refused("true_cfg_scale", lcm, true_cfg_scale=2)


def test_what_trades_exactness_for_time_is_there_where_every_placement_has_it() -> None:
    assert order(step_cache=0.2).step_cache == 0.2
    refused("step_cache", step_cache=1.1)
    refused("step_cache", place=fleet(SHAPES, step_cache=False), step_cache=0.2)
    refused("tiny_vae", tiny_vae=True)
    assert order(place=fleet(SHAPES, tiny_vae="a folder"), tiny_vae=True).tiny_vae
    mixed = Fleet((*fleet(SHAPES, tiny_vae="a folder").placements, *fleet(SHAPES).placements))
    refused("tiny_vae", place=mixed, tiny_vae=True)


def test_previews() -> None:
    assert order(num_inference_steps=5, preview_every=5).preview_every == 5
    for wrong in (-1, 6):
        refused("preview_every", num_inference_steps=5, preview_every=wrong)


def test_every_image_of_an_order_has_a_seed() -> None:
    assert order(seed=2**32 - 4, num_images=4).seed == 2**32 - 4
    assert "4294967292" in refused("seed", seed=2**32 - 3, num_images=4)
    assert order(seed=2**32 - 1).seed == 2**32 - 1


def test_the_file_s_format() -> None:
    plain = order()
    assert (plain.output_format, plain.output_compression, plain.bit_depth) == ("png", None, 8)
    assert order(bit_depth=16).bit_depth == 16
    for kind in ("jpeg", "webp"):
        assert order(output_format=kind).output_compression == 90
        for quality in (0, 100):
            assert order(output_format=kind, output_compression=quality).output_compression == quality
        for wrong in (-1, 101):
            refused("output_compression", output_format=kind, output_compression=wrong)
        assert "only a png" in refused("bit_depth", output_format=kind, bit_depth=16)
    refused("output_compression", output_compression=90)
    assert "png, jpeg, webp" in refused("output_format", output_format="gif")
    refused("bit_depth", bit_depth=12)
    wide = LimitSettings(max_side=32768)
    new = NewImage(prompt="a", width=16392, height=64, output_format="webp")
    with pytest.raises(InvalidRequest, match="16383"):
        complete(new, {"shapes": SHAPES}, fleet(SHAPES, max_pixels=2**30), wide)
