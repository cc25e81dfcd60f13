"""What a replica plans by the card that it finds. The shipped model's shape on cards that are as small as that."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from serve.devices import Card
from serve.errors import OperatorError
from serve.memory.footprint import footprint
from serve.memory.planner import USABLE
from serve.memory.shapes import shape_of
from serve.memory.terms import ModelShape
from serve.models import ModelFolder, resolve
from serve.placements import Placement, plan_placements
from serve.replica_plan import card_use, planned_here, tell_plan
from serve.rungs import LADDER, MEANS, Rung
from serve.settings.pools import GpuClassSettings, ModelSettings
from serve.settings.tree import Settings


@pytest.fixture(scope="module")
def model() -> ModelFolder:
    return resolve(ModelSettings(), Path())


@pytest.fixture(scope="module")
def shape(model: ModelFolder) -> ModelShape:
    return shape_of(model)


def placed(model: ModelFolder, **tree: object) -> Placement:
    (placement,) = plan_placements(Settings(**tree), {model.name: model})  # type: ignore[arg-type]
    return placement


def peak(shape: ModelShape, rung: Rung) -> int:
    return footprint(shape, "float16", rung, shape.default_width, shape.default_height, shape.lanes).peak


def card(usable: float) -> Card:
    """That a plan may take so many bytes of."""
    return Card("a small card", int(usable / USABLE) + 1, ("float16", "float32"))


def test_a_replica_without_a_class_plans_by_the_card_that_it_finds(model: ModelFolder, shape: ModelShape) -> None:
    place = placed(model)
    assert (place.rung, place.plan, place.memory_bytes) == (Rung.RESIDENT, None, 0)
    found = card(peak(shape, Rung.RESIDENT))
    made = planned_here(place, model, found)
    assert made.rung is Rung.RESIDENT
    assert made.plan is not None
    assert made.plan.footprint.peak <= made.plan.budget <= USABLE * found.memory_bytes
    assert made.memory_bytes == found.memory_bytes
    assert made.plan.max_pixels == made.max_pixels < place.max_pixels
    assert replace(made, max_pixels=place.max_pixels, plan=None, memory_bytes=0) == place


def test_how_large_images_may_be_is_the_operators_word(model: ModelFolder, shape: ModelShape) -> None:
    place = placed(model, diffusion={"max_pixels": 64 * 64})
    assert planned_here(place, model, card(2 * peak(shape, Rung.RESIDENT))).max_pixels == 64 * 64


def test_a_replica_takes_nothing_that_only_a_larger_one_holds(model: ModelFolder, shape: ModelShape) -> None:
    """What another placement is smaller by counts no more, where this one turns out as small."""
    place = replace(placed(model), smaller=1 << 20)
    assert planned_here(place, model, card(peak(shape, Rung.RESIDENT))).smaller == 0
    assert planned_here(place, model, card(80e9)).smaller == 1 << 20


def test_a_smaller_card_means_a_lower_rung(model: ModelFolder, shape: ModelShape) -> None:
    least = min(peak(shape, rung) for rung in LADDER if MEANS[rung].on_card)
    made = planned_here(placed(model), model, card(least))
    assert made.rung not in (Rung.RESIDENT, Rung.CPU)
    assert made.plan is not None
    assert made.plan.footprint.peak <= made.plan.budget


def test_half_of_a_card_is_planned_as_half(model: ModelFolder, shape: ModelShape) -> None:
    found = card(2 * peak(shape, Rung.RESIDENT))
    made = planned_here(placed(model, diffusion={"num_gpus": 0.5}), model, found)
    assert made.plan is not None
    assert made.plan.budget <= USABLE * found.memory_bytes / 2
    assert (made.rung, made.memory_bytes) == (Rung.RESIDENT, found.memory_bytes // 2)


def test_a_card_that_holds_no_image_is_refused_and_named(model: ModelFolder) -> None:
    with pytest.raises(OperatorError, match=r"the 0\.0 GB of a small card hold no image of shapes down to") as raised:
        planned_here(placed(model), model, card(1000))
    assert raised.value.param == "diffusion.worst_rung"


def test_the_class_counts_where_one_is_declared(model: ModelFolder) -> None:
    """Whatever card is here: what the placement promises, every replica of it keeps."""
    classes = {"4gb": GpuClassSettings(memory_gb=4)}
    place = placed(model, gpu_classes=classes, diffusion={"gpu_class": "4gb", "num_gpus": 1})
    assert place.plan is not None
    assert planned_here(place, model, card(80e9)) is place


def test_without_a_card_nothing_is_planned(model: ModelFolder) -> None:
    place = placed(model)
    assert planned_here(place, model, None) is place
    assert card_use(place) is None


def test_the_plan_is_one_line_of_the_log(model: ModelFolder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="serve.replica_plan")
    tell_plan(placed(model))
    assert caplog.messages == []
    found = Card("a card", 4_000_000_000, ("float16",))
    made = planned_here(placed(model, limits={"max_side": 1024}), model, found)
    tell_plan(made)
    (line,) = caplog.messages
    assert line.startswith("shapes on 4.0 GB: resident, 0.")
    assert line.endswith(" GB planned, largest image 1024 x 1024")


@pytest.mark.parametrize(("worst", "said"), [("vae_tiling", " pixels"), ("cpu", "draws it on the CPU")])
def test_a_plan_that_does_not_fit_is_a_warning(
    model: ModelFolder, shape: ModelShape, caplog: pytest.LogCaptureFixture, worst: str, said: str
) -> None:
    """Images that the operator lets in have no room: below a rung that moves weights, or on any."""
    least = min(peak(shape, rung) for rung in LADDER if MEANS[rung].on_card)
    usable = peak(shape, Rung.VAE_TILING) if worst == "vae_tiling" else least
    own = {"max_pixels": 2048 * 2048, "worst_rung": worst}
    made = planned_here(placed(model, diffusion=own), model, card(usable))
    assert made.plan is not None
    assert not made.plan.fits
    tell_plan(made)
    (line,) = (each.getMessage() for each in caplog.records if each.levelname == "WARNING")
    assert f"no rung down to {worst} has room for an image of 2048 x 2048; " in line
    assert line.endswith(said)
