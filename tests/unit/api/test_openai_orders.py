"""OpenAI's fields as an order of ours."""

from typing import Any

import pytest
from pydantic import ValidationError

from serve.api.openai_orders import EditOrder, GenerationOrder, asked
from serve.callers import Caller
from serve.errors import InvalidRequest
from serve.models.quality import quality_steps
from serve.orders import NewImage


def steps_of(model: str | None) -> dict[str, int]:
    return quality_steps(20, 50)


def order(**fields: Any) -> NewImage:
    return asked(GenerationOrder(prompt="a circle", **fields), steps_of, Caller(salt="s"), "image").new


@pytest.mark.parametrize(
    ("quality", "steps"),
    [(None, 20), ("auto", 20), ("standard", 20), ("medium", 20), ("low", 10), ("high", 30), ("hd", 30), ("max", 50)],
)
def test_quality_is_steps_where_none_are_named(quality: Any, steps: int) -> None:
    assert order(quality=quality).num_inference_steps == steps
    assert order(quality=quality, num_inference_steps=7).num_inference_steps == 7


def test_a_model_of_one_step_makes_one_at_least() -> None:
    assert quality_steps(1, 150) == {"low": 1, "medium": 1, "high": 2, "xhigh": 2, "max": 3}


@pytest.mark.parametrize(("size", "pixels"), [("64x128", (64, 128)), ("auto", (None, None)), (None, (None, None))])
def test_a_size_is_width_and_height(size: str | None, pixels: tuple[int | None, int | None]) -> None:
    new = order(size=size)
    assert (new.width, new.height) == pixels


@pytest.mark.parametrize("size", ["64", "64X64", "0x64", "-64x64", " 64x64", "64x64\n", "999999x64", "16:9", "٦٤x٦٤"])
def test_no_other_size_is_read(size: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        order(size=size)
    assert refused.value.param == "size"


def test_a_size_does_not_stand_beside_a_width() -> None:
    with pytest.raises(InvalidRequest, match="size stands in place of width"):
        order(size="64x64", width=64)


@pytest.mark.parametrize(
    ("partial", "steps", "strength", "every"),
    [
        (0, 20, None, 0),
        (3, 20, None, 5),
        (3, 11, None, 2),
        (3, 2, None, 1),
        (1, 20, 0.5, 5),
        (3, 10**400, 1e308, 250_000),
    ],
)
def test_previews_are_at_hand_when_partial_pictures_are_due(
    partial: int, steps: int, strength: float | None, every: int
) -> None:
    fields: dict[str, Any] = {"partial_images": partial, "num_inference_steps": steps, "strength": strength}
    assert order(stream=True, **fields).preview_every == every
    assert order(**fields).preview_every == 0


def test_refusals_name_the_fields_that_were_sent() -> None:
    def names(model: type[GenerationOrder], **fields: Any) -> dict[str, str]:
        return dict(asked(model(prompt="a", **fields), steps_of, Caller(), "image").names)

    assert names(GenerationOrder) == names(GenerationOrder, width=64, num_images=2) == {}
    assert names(GenerationOrder, size="64x64", n=2, quality="low") == {
        "width": "size",
        "height": "size",
        "num_images": "n",
        "num_inference_steps": "quality",
    }
    assert names(EditOrder, images=[{"image_url": "data:,"}]) == {"image": "images"}


def test_in_a_form_numbers_are_text_and_in_json_they_are_not() -> None:
    fields = {"n": "2", "stream": "true", "guidance_scale": "2.5", "priority": "batch"}
    form = EditOrder.model_validate(fields, strict=False)
    assert (form.n, form.stream, form.guidance_scale, form.priority) == (2, True, 2.5, "batch")
    with pytest.raises(ValidationError):
        EditOrder.model_validate(fields)
    assert EditOrder.model_validate({"priority": "batch", "n": None}).priority == "batch"
