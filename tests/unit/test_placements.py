"""What is drawn where, on which rung, how large an image each place holds, and which setting is at fault where that
can't be."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support.published_folders import published_model

from serve.errors import InvalidRequest, OperatorError
from serve.memory.planner import USABLE, plan
from serve.memory.shapes import published, shape_of
from serve.models import ModelFolder
from serve.origins import load
from serve.placements import GRID, Fleet, Placement, draws, held_size, plan_placements, plan_share
from serve.rungs import LADDER, Rung
from serve.settings.pools import DiffusionSettings
from serve.settings.room import RungName
from serve.settings.tree import Settings

CLASSES = {"4gb": {"memory_gb": 4, "dtypes": ["float16"]}, "11gb": {"memory_gb": 11, "dtypes": ["float16", "float32"]}}
SIDES = st.integers(1, 256).map(lambda each: 8 * each)

Models = Mapping[str, ModelFolder]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Of their published size; `sd15` is the model of an order that names none."""
    folders = tmp_path_factory.mktemp("models")
    return {name: published_model(folders / name, name) for name in ("sd15", "sdxl")}


@pytest.fixture
def one(models: Models) -> Models:
    return {"sd15": models["sd15"]}


@pytest.fixture
def xl(models: Models) -> Models:
    return {"sdxl": models["sdxl"]}


def renamed(model: ModelFolder, name: str) -> ModelFolder:
    return dataclasses.replace(model, name=name)


def planned(drawn: Models, **tree: Any) -> dict[str, Placement]:
    placements = plan_placements(Settings(**tree), drawn)
    assert len({each.name for each in placements}) == len(placements)
    return {each.name: each for each in placements}


def at_fault(drawn: Models, **tree: Any) -> str:
    return refusal(drawn, **tree).partition(": ")[0]


def refusal(drawn: Models, **tree: Any) -> str:
    with pytest.raises(OperatorError) as raised:
        plan_placements(Settings(**tree), drawn)
    assert raised.value.message.startswith(f"{raised.value.param}: ")
    assert "\n" not in raised.value.message
    return raised.value.message


def test_without_placements_each_model_has_one_named_after_it(models: Models) -> None:
    found = planned(models, diffusion={"max_batch_size": 3})
    assert list(found) == ["sd15", "sdxl"]
    assert [each.model for each in found.values()] == ["sd15", "sdxl"]
    assert {each.settings.max_batch_size for each in found.values()} == {3}
    assert {(each.max_pixels, each.smaller, each.gpu_class) for each in found.values()} == {(2048**2, 0, None)}


def test_a_models_name_becomes_fit_for_a_deployment(models: Models) -> None:
    names = "my model#1", "my/model 1"
    found = planned({name: renamed(models["sd15"], name) for name in names})
    assert [each.model for each in found.values()] == ["my model#1", "my/model 1"]
    assert not any(set(" #/") & set(name) for name in found)


def test_without_a_class_nothing_is_planned_before_a_card_is_found(one: Models) -> None:
    (place,) = planned(one).values()
    assert (place.plan, place.memory_bytes, place.rung) == (None, 0, Rung.RESIDENT)
    (place,) = planned(one, diffusion={"rung": "int8"}).values()
    assert (place.plan, place.rung) == (None, Rung.INT8)


def test_the_plan_of_a_class_is_the_placements(models: Models) -> None:
    """What `tandem plan` says of a model on a class is what a placement there promises."""
    found = planned(models, gpu_classes=CLASSES, diffusion={"gpu_class": "11gb"})
    for name, place in found.items():
        own = plan(published()[name], 11e9, ("float16", "float32"))
        assert place.plan == own
        assert (place.rung, place.max_pixels, place.memory_bytes) == (own.rung, min(own.max_pixels, 2048**2), 11e9)
        assert place.shape is not None
        assert dataclasses.replace(place.shape, name=name) == dataclasses.replace(
            shape_of(models[name]), text_tokens=place.shape.text_tokens
        )


def test_what_is_printed_on_the_box_holds_what_it_is_bought_for(models: Models) -> None:
    """SD 1.5 on 4 GB and SDXL on 11 GB, each with all of its weights on the card."""
    found = planned(
        models,
        gpu_classes=CLASSES,
        placements={"small": {"model": "sd15", "gpu_class": "4gb"}, "xl": {"model": "sdxl", "gpu_class": "11gb"}},
    )
    assert {each.rung for each in found.values()} == {Rung.RESIDENT}
    assert found["small"].max_pixels >= 512 * 768
    assert found["xl"].max_pixels >= 1344 * 768


def test_two_classes_of_one_model(one: Models) -> None:
    found = planned(
        one,
        gpu_classes=CLASSES,
        diffusion={"dtype": "float16"},
        placements={"small": {"gpu_class": "4gb", "replicas": 3}, "large": {"gpu_class": "11gb", "model": "sd15"}},
    )
    small, large = found["small"], found["large"]
    assert (small.model, small.gpu_class, small.settings.replicas) == ("sd15", "4gb", 3)
    assert small.max_pixels < large.max_pixels
    assert (small.smaller, large.smaller) == (0, small.max_pixels)


def test_a_share_of_a_card_has_that_share_of_its_memory(one: Models) -> None:
    found = planned(
        one,
        gpu_classes=CLASSES,
        diffusion={"gpu_class": "11gb"},
        placements={"half": {"num_gpus": 0.5}, "whole": {"num_gpus": 1}},
    )
    half, whole = found["half"], found["whole"]
    assert (half.memory_bytes, whole.memory_bytes) == (5.5e9, 11e9)
    assert half.plan is not None
    assert half.plan.budget == int(USABLE * 5.5e9)
    assert half.plan.footprint.peak <= half.plan.budget


def test_a_class_says_in_what_it_computes(one: Models) -> None:
    half, full = ({"card": {"memory_gb": 6, "dtypes": [dtype]}} for dtype in ("float16", "float32"))
    use = {"gpu_class": "card"}
    found = {
        "half": planned(one, gpu_classes=half, diffusion=use)["sd15"],
        "full": planned(one, gpu_classes=full, diffusion=use)["sd15"],
        "named": planned(one, gpu_classes=half, diffusion=use | {"dtype": "float32"})["sd15"],
        "cpu": planned(one, gpu_classes=half, diffusion=use | {"device": "cpu"})["sd15"],
    }
    most = {name: place.max_pixels for name, place in found.items()}
    assert most["half"] > most["full"] == most["named"] == most["cpu"]
    assert found["half"].plan is not None
    assert found["half"].plan.dtype == "float16"
    assert {place.plan and place.plan.dtype for name, place in found.items() if name != "half"} == {"float32"}


def test_the_example_of_the_documentation_can_be_placed(models: Models) -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```yaml\n(.*?)```", page, re.S) if "gpu_classes" in block)
    found = planned(models, **yaml.safe_load(example))
    assert {name: (each.model, each.gpu_class) for name, each in found.items()} == {
        "sd-small": ("sd15", "4gb"),
        "sd-large": ("sd15", "11gb"),
        "xl": ("sdxl", "11gb"),
    }
    assert {each.rung for each in found.values()} == {Rung.RESIDENT}
    assert found["sd-small"].max_pixels < found["sd-large"].max_pixels
    told = re.search(
        r"SD 1.5 draws up to (\d+) x \1 on 4 GB and SDXL up to (\d+) x \2 on 11 GB", " ".join(page.split())
    )
    assert told is not None
    whole = {name: each.plan.max_pixels for name, each in found.items() if each.plan is not None}
    assert [int(side) for side in told.groups()] == [held_size(1, 1, whole[name])[0] for name in ("sd-small", "xl")]
    xl = found["xl"].plan
    assert xl is not None
    assert (xl.tile_of(1024**2), xl.tile_of(1536**2)) == (1024, 768)


def test_the_setting_at_fault_is_named(models: Models, one: Models) -> None:
    classes = {"gpu_classes": CLASSES}
    plain = {"model": "sdxl", "gpu_class": "4gb", "worst_rung": "attention_slicing"}
    assert at_fault(models, **classes, diffusion=plain | {"model": None}) == "diffusion.gpu_class"
    assert at_fault(models, **classes, placements={"xl": plain}) == "placements.xl.gpu_class"
    third = plain | {"gpu_class": "11gb", "num_gpus": 0.3}
    assert at_fault(models, **classes, placements={"xl": third}) == "placements.xl.gpu_class"
    assert at_fault(models, placements={"a": {"model": "sd14"}}) == "placements.a.model"
    assert at_fault(models, diffusion={"model": "sd14"}, placements={"a": {}}) == "diffusion.model"
    assert at_fault(models, diffusion={"model": "sd14"}) == "diffusion.model"
    assert at_fault(models, diffusion={"model": "sd15"}) == "diffusion.model"
    assert models["sd15"].denoiser is not None
    coarse = dataclasses.replace(models["sd15"].denoiser, size_multiple=16)
    assert at_fault(
        {"sd15": dataclasses.replace(models["sd15"], denoiser=coarse)}, placements={"a": {"max_pixels": 64}}
    ) == ("placements.a.max_pixels")
    assert at_fault(models, placements={"a": {"model": "sdxl"}}) == "placements"
    assert at_fault(models, placements={"a": {}, "b": {"model": "sdxl", "replicas": 0}}) == "placements"


def test_a_refused_class_is_told_how_far_down_was_looked_and_which_would_do(xl: Models) -> None:
    use = {"gpu_class": "4gb", "worst_rung": "attention_slicing"}
    told = refusal(xl, gpu_classes=CLASSES, diffusion=use)
    assert "4 GB hold no image of sdxl" in told
    assert "not even on the rung attention_slicing" in told
    assert "the smallest that would do has 8 GB" in told
    (held,) = planned(xl, gpu_classes=CLASSES, diffusion={"gpu_class": "4gb"}).values()
    assert held.rung in LADDER[LADDER.index(Rung.INT8) :]
    tiny = {"tiny": {"memory_gb": 0.2}}
    assert "the smallest that would do has 4 GB" in refusal(xl, gpu_classes=tiny, diffusion={"gpu_class": "tiny"})


def test_the_ladder_is_taken_from_one_rung_to_another(xl: Models) -> None:
    def rung(**own: Any) -> Rung:
        (place,) = planned(xl, gpu_classes=CLASSES, diffusion={"gpu_class": "11gb"} | own).values()
        assert place.plan is not None
        assert place.plan.rung == place.rung
        return place.rung

    assert rung() is Rung.RESIDENT
    assert rung(rung="vae_slicing") is Rung.VAE_SLICING
    assert rung(rung="int4") is Rung.INT4
    assert rung(rung="cpu", worst_rung="cpu") is Rung.CPU


def test_where_nothing_fits_the_card_the_cpu_is_taken_only_if_it_is_allowed(xl: Models) -> None:
    tiny = {"gpu_classes": {"tiny": {"memory_gb": 0.2}}}
    assert at_fault(xl, **tiny, diffusion={"gpu_class": "tiny"}) == "diffusion.gpu_class"
    (place,) = planned(xl, **tiny, diffusion={"gpu_class": "tiny", "worst_rung": "cpu"}).values()
    assert place.rung is Rung.CPU
    assert place.plan is not None
    assert not place.plan.fits
    assert place.max_pixels == 2048**2


def test_a_size_that_is_wished_for_is_planned_for(xl: Models) -> None:
    """More pixels take a lower rung, fewer a higher one; the settings' number stands in any case."""
    small = {"gpu_classes": {"card": {"memory_gb": 7.5, "dtypes": ["float16"]}}}
    rungs = []
    for side in (512, 1024, 2048):
        (place,) = planned(xl, **small, diffusion={"gpu_class": "card", "max_pixels": side**2}).values()
        assert place.max_pixels == side**2
        assert place.plan is not None
        assert (place.plan.width, place.plan.height) == (side, side)
        rungs.append(LADDER.index(place.rung))
    assert rungs == sorted(rungs)
    assert rungs[0] < rungs[-1]


def test_what_the_limits_let_in_is_enough_to_plan_for(xl: Models) -> None:
    (place,) = planned(xl, gpu_classes=CLASSES, diffusion={"gpu_class": "11gb"}, limits={"max_side": 512}).values()
    assert place.plan is not None
    assert (place.plan.width, place.plan.height) == (512, 512)
    assert place.max_pixels == 512**2


def test_the_settings_know_every_rung() -> None:
    assert get_args(RungName) == tuple(each.value for each in LADDER)
    assert DiffusionSettings().best_rung is LADDER[0]
    assert [DiffusionSettings(rung=name, worst_rung="cpu").best_rung for name in get_args(RungName)] == list(LADDER)
    with pytest.raises(ValidationError, match="rung int4 is below worst_rung int8"):
        DiffusionSettings(rung="int4", worst_rung="int8")


@pytest.mark.parametrize(
    ("placements", "place"),
    [
        ({"a": {"gpu_clas": "4gb"}}, ("placements", "a", "gpu_clas")),
        ({"a": {"gpu_class": "8gb"}}, ("placements", "a", "gpu_class")),
        ({"a": {"replicas": "few"}}, ("placements", "a", "replicas")),
        ({"a": {"num_gpus": 1.5}}, ("placements", "a", "num_gpus")),
        ({"a": {"num_gpus": 2}}, ("placements", "a", "num_gpus")),
        ({"a": {"rung": "int9"}}, ("placements", "a", "rung")),
        ({"a": {"rung": "int4", "worst_rung": "int8"}}, ("placements", "a")),
        ({"a#b": {}}, ("placements", "a#b")),
    ],
)
def test_what_can_be_seen_without_the_models_is_refused_with_the_settings(
    placements: dict[str, Any], place: tuple[str, ...]
) -> None:
    with pytest.raises(ValidationError) as raised:
        Settings(gpu_classes=CLASSES, placements=placements)
    assert [fault["loc"] for fault in raised.value.errors()] == [place]


def test_a_class_that_is_not_there_is_refused_in_diffusion_too() -> None:
    with pytest.raises(ValidationError, match="there is no GPU class 4gb; gpu_classes has none"):
        Settings(diffusion={"gpu_class": "4gb"})


def test_nothing_is_drawn_without_replicas() -> None:
    for tree in ({"diffusion": {"replicas": 0}}, {"placements": {"a": {"replicas": 0}}}):
        assert not draws(Settings(**tree))
        assert plan_placements(Settings(**tree), {}) == ()
    assert draws(Settings())
    assert draws(Settings(diffusion={"replicas": 0}, placements={"a": {"replicas": 1}}))


def test_a_placement_that_sleeps_is_one(one: Models) -> None:
    own = {"replicas": 0, "min_replicas": 0, "max_replicas": 3}
    assert draws(Settings(diffusion=own))
    found = planned(one, diffusion=own, placements={"sleeper": {}, "none": {"max_replicas": 0}})
    assert list(found) == ["sleeper"]
    assert (found["sleeper"].settings.least_replicas, found["sleeper"].settings.most_replicas) == (0, 3)


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"min_replicas": 2}, "min_replicas 2 is more than replicas 1"),
        ({"replicas": 3, "max_replicas": 2}, "replicas 3 is more than max_replicas 2"),
        ({"replicas": 3, "min_replicas": 5, "max_replicas": 4}, "min_replicas 5 is more than replicas 3"),
    ],
)
def test_there_are_no_fewer_than_the_fewest_at_the_start_and_no_more_than_the_most(
    own: dict[str, int], told: str
) -> None:
    with pytest.raises(OperatorError) as raised:
        load(overrides={f"diffusion.{name}": value for name, value in own.items()}, environ={})
    assert raised.value.message.startswith(f"diffusion: {told}")
    with pytest.raises(ValidationError, match=told):
        Settings(placements={"a": own})


@settings(max_examples=20)  # each reads headers
@given(
    st.lists(st.floats(0.5, 100), min_size=1, max_size=4),
    st.sampled_from(["sd15", "sdxl"]),
    st.sampled_from(["float16", "float32"]),
)
def test_placements_divide_the_sizes_among_themselves(
    models: Models, sizes: list[float], name: str, dtype: str
) -> None:
    classes = {f"c{index}": {"memory_gb": size} for index, size in enumerate(sizes)}
    tree = {
        "gpu_classes": classes,
        "diffusion": {"dtype": dtype},
        "placements": {name: {"gpu_class": name} for name in classes},
    }
    try:
        found = planned({name: models[name]}, **tree)
    except OperatorError:
        assert min(sizes) < 1.5
        return
    placements = list(found.values())
    for each, size in zip(placements, sizes, strict=True):
        assert 8**2 <= each.max_pixels <= 2048**2
        assert each.plan is not None
        assert each.plan.fits is (each.plan.footprint.peak <= USABLE * size * 1e9)
        assert each.plan.fits is (each.max_pixels >= each.plan.width * each.plan.height)
        # The bands between `smaller` and `max_pixels` cover everything from the smallest image to the largest.
        assert each.smaller < each.max_pixels
        assert each.smaller in {0, *(other.max_pixels for other in placements)}
        assert not any(each.smaller < other.max_pixels < each.max_pixels for other in placements)


def test_an_order_that_nobody_holds_is_told_which_card_would(xl: Models) -> None:
    own = {"gpu_class": "card", "worst_rung": "attention_slicing"}
    fleet = Fleet(plan_placements(Settings(gpu_classes={"card": {"memory_gb": 7}}, diffusion=own), xl))
    assert fleet.max_pixels("sdxl") < 2048**2
    with pytest.raises(InvalidRequest, match=r"such as \d+ x \d+; a GPU of (8|11|24) GB would hold it") as raised:
        fleet.check("sdxl", 2048, 2048)
    assert raised.value.param == "width"
    # Where the operator's own bound is what is short, no card would help.
    bound = Fleet(
        plan_placements(Settings(gpu_classes={"card": {"memory_gb": 80}}, diffusion=own | {"max_pixels": 4096}), xl)
    )
    with pytest.raises(InvalidRequest) as raised:
        bound.check("sdxl", 512, 512)
    assert "GB" not in raised.value.message


def test_a_share_is_planned_by_the_card_that_is_found_just_as_by_its_class(models: Models) -> None:
    own = DiffusionSettings(gpu_class="11gb", num_gpus=0.5)
    (place,) = planned({"sd15": models["sd15"]}, gpu_classes=CLASSES, diffusion=own.model_dump()).values()
    assert plan_share(own, shape_of(models["sd15"]), 5.5e9, ("float16", "float32"), 2048**2) == place.plan


@given(SIDES, SIDES, st.lists(st.integers(64, 2048**2), min_size=1, max_size=4))
def test_the_door_lets_in_what_somebody_holds(width: int, height: int, held: list[int]) -> None:
    placements = tuple(
        Placement(name=str(index), model="m", gpu_class=None, settings=DiffusionSettings(), max_pixels=pixels)
        for index, pixels in enumerate(held)
    )
    fleet = Fleet(placements)
    if width * height <= max(held):
        fleet.check("m", width, height)
        return
    with pytest.raises(InvalidRequest) as raised:
        fleet.check("m", width, height)
    assert raised.value.param == "width"
    assert str(max(held)) in raised.value.message
    assert "such as" in raised.value.message


@given(SIDES, SIDES, st.integers(GRID * GRID, 2048**2))
def test_the_size_that_is_offered_is_held_and_has_the_same_form(width: int, height: int, pixels: int) -> None:
    assume(width * height > pixels)
    wide, high = held_size(width, height, pixels)
    assert wide * high <= pixels
    assert wide % GRID == high % GRID == 0
    assert wide > 0 < high
    assert (wide <= high) if width <= height else (wide >= high)
    assert max(wide, high) * min(width, height) <= max(width, height) * (min(wide, high) + GRID)


def test_what_an_order_may_choose_is_what_every_placement_of_its_model_has() -> None:
    def fleet(*settings: DiffusionSettings) -> Fleet:
        return Fleet(
            tuple(
                Placement(name=str(index), model="m", gpu_class=None, settings=each, max_pixels=64)
                for index, each in enumerate(settings)
            )
        )

    tiny, plain = DiffusionSettings(tiny_vae="/taesd"), DiffusionSettings(step_cache=False)
    assert fleet(tiny, tiny).tiny_vae("m")
    assert not fleet(tiny, plain).tiny_vae("m")
    assert fleet(tiny).step_cache("m")
    assert not fleet(tiny, plain).step_cache("m")
    assert not Fleet(()).step_cache("m")
    assert Fleet(()).max_pixels("m") == 0


@pytest.mark.parametrize("size", [{}, {"max_pixels": 512 * 512}])
def test_weights_that_have_no_room_are_refused_however_large_images_may_be(
    one: Models, size: Mapping[str, int]
) -> None:
    tiny = {"tiny": {"memory_gb": 1.5, "dtypes": ["float16"]}}
    own = {"gpu_class": "tiny", "worst_rung": "resident", **size}
    said = refusal(one, gpu_classes=tiny, placements={"p": own})
    assert said.startswith("placements.p.gpu_class: 1.5 GB hold no image of sd15 beside its 1.9 GB of weights")
