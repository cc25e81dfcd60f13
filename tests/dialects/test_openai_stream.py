"""Pictures that come bit by bit, as OpenAI's own client reads them."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from openai import OpenAI, UnprocessableEntityError
from PIL import Image
from support.drawing import Drawing
from support.openai_clients import client_of, file_of, pixels

FAST = {"seed": 3, "num_inference_steps": 3}
SLOW = {"seed": 3, "num_inference_steps": 16}
"""A preview is kept until the next one of its picture, or the job's end: these are some tenths of a second apart."""
WORDS = "a red circle on a blue background"


@pytest.fixture(scope="module")
def client(drawing: Drawing) -> OpenAI:
    """Of a server that has made a preview: the first one takes a second, and misses its picture."""
    client = client_of(drawing, max_retries=0)
    while len(list(client.images.generate(prompt=WORDS, stream=True, partial_images=1, extra_body=SLOW))) < 2:
        pass
    return client


def test_partial_pictures_come_near_the_whole_one(client: OpenAI) -> None:
    events: list[Any] = list(client.images.generate(prompt=WORDS, stream=True, partial_images=3, extra_body=SLOW))
    some = len(events) - 1  # a busy machine may miss one
    assert 1 <= some <= 3
    assert [each.type for each in events] == ["image_generation.partial_image"] * some + ["image_generation.completed"]
    assert [each.partial_image_index for each in events[:-1]] == list(range(some))
    assert {(each.size, each.output_format, each.quality, each.background) for each in events} == {
        ("128x128", "png", "medium", "opaque")
    }
    whole = pixels(events[-1].b64_json).astype(int)
    away = [np.abs(pixels(each.b64_json) - whole).mean() for each in events[:-1]]
    assert away == sorted(away, reverse=True)
    assert events[-1].usage.total_tokens == 7 + 64
    at_once = client.images.generate(prompt=WORDS, extra_body=SLOW)
    assert np.abs(pixels(file_of(at_once)) - whole).max() <= 1


def test_an_edit_comes_bit_by_bit_too(client: OpenAI) -> None:
    source = file_of(client.images.generate(prompt=WORDS, size="64x64", extra_body=FAST))
    events: list[Any] = list(
        client.images.edit(
            image=source, prompt=WORDS, output_format="webp", n=2, stream=True, partial_images=1, extra_body=FAST
        )
    )
    whole = events[-2:]
    assert {each.type for each in events[:-2]} <= {"image_edit.partial_image"}
    assert [(each.type, each.index, each.seed) for each in whole] == [
        ("image_edit.completed", 0, 3),
        ("image_edit.completed", 1, 4),
    ]
    files = [Image.open(io.BytesIO(base64.b64decode(each.b64_json))) for each in whole]
    assert {(each.format, each.size) for each in files} == {("WEBP", (64, 64))}
    assert [each.usage.output_tokens for each in whole] == [16, 16]
    assert [each.usage.input_tokens_details.image_tokens for each in whole] == [16, 0]


@pytest.mark.parametrize("partial", [None, 0])
def test_without_partial_pictures_the_whole_one_comes_alone(client: OpenAI, partial: int | None) -> None:
    events = list(
        client.images.generate(prompt=WORDS, size="64x64", stream=True, partial_images=partial, extra_body=FAST)
    )
    assert [each.type for each in events] == ["image_generation.completed"]


@pytest.mark.parametrize(
    ("asked", "named"), [({"partial_images": 4}, "partial_images"), ({"response_format": "url"}, "response_format")]
)
def test_what_cant_be_streamed_is_refused_before_the_stream(client: OpenAI, asked: dict[str, Any], named: str) -> None:
    with pytest.raises(UnprocessableEntityError) as refused:
        client.images.generate(prompt=WORDS, stream=True, **asked)
    assert refused.value.param == named
