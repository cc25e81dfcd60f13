"""Edits and variations as OpenAI's own client orders them: what is transparent is drawn anew, and nothing else."""

import base64
import io
from typing import Any

import httpx
import numpy as np
import pytest
from openai import OpenAI, UnprocessableEntityError
from PIL import Image
from support.drawing import Drawing
from support.openai_clients import Pixels, client_of, file_of, pixels

from serve.shapes.judge import read

FAST = {"seed": 5, "num_inference_steps": 4}
WORDS = "a yellow star on a white background"


@pytest.fixture(scope="module")
def client(drawing: Drawing) -> OpenAI:
    return client_of(drawing, max_retries=0)


@pytest.fixture(scope="module")
def source(client: OpenAI) -> bytes:
    """A red circle on blue."""
    return file_of(client.images.generate(prompt="a red circle on a blue background", extra_body={"seed": 3}))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def half_transparent(picture: Pixels) -> bytes:
    """The picture, of which the right half is transparent."""
    alpha = np.full(picture.shape[:2], 255, np.uint8)
    alpha[:, alpha.shape[1] // 2 :] = 0
    return png(Image.fromarray(np.dstack([picture, alpha])))


def changes(before: bytes, answer: Any) -> tuple[int, float]:
    """The largest change of a channel in the left half, and the mean one in the right half."""
    moved = np.abs(pixels(before).astype(int) - pixels(answer.data[0].b64_json))
    return int(moved[:, :64].max()), float(moved[:, 64:].mean())


def test_only_what_is_transparent_in_the_mask_is_drawn(client: OpenAI, source: bytes) -> None:
    mask = half_transparent(np.zeros((128, 128, 3), np.uint8))
    answer = client.images.edit(image=source, mask=mask, prompt=WORDS, extra_body=FAST)
    left, right = changes(source, answer)
    assert left == 0
    assert right > 60
    assert answer.usage
    assert answer.usage.input_tokens_details.image_tokens == 64
    named = client.images.edit(
        image=("a.png", source, "image/png"), mask=("b.png", mask, "image/png"), prompt=WORDS, extra_body=FAST
    )
    assert file_of(named) == file_of(answer)


def test_a_pictures_own_transparency_is_its_mask(client: OpenAI, source: bytes) -> None:
    left, right = changes(
        source, client.images.edit(image=half_transparent(pixels(source)), prompt=WORDS, extra_body=FAST)
    )
    assert left == 0
    assert right > 60


def test_an_opaque_picture_is_drawn_over_as_a_whole(client: OpenAI, source: bytes) -> None:
    answer = client.images.edit(image=source, prompt=WORDS, size="128x128", extra_body=FAST)
    assert min(changes(source, answer)) > 20
    rgba = png(Image.open(io.BytesIO(source)).convert("RGBA"))
    again = client.images.edit(image=[rgba], prompt=WORDS, n=1, extra_body=FAST)
    assert (pixels(file_of(again)) == pixels(file_of(answer))).all()


def test_json_says_the_same_as_a_form(client: OpenAI, drawing: Drawing, source: bytes) -> None:
    mask = half_transparent(np.zeros((128, 128, 3), np.uint8))
    form = client.images.edit(image=source, mask=mask, prompt=WORDS, extra_body=FAST)
    urls = [f"data:image/png;base64,{base64.b64encode(each).decode()}" for each in (source, mask)]
    body = {"prompt": WORDS, "images": [{"image_url": urls[0]}], "mask": {"image_url": urls[1]}, **FAST}
    answer = httpx.post(f"{drawing.url}/v1/images/edits", json=body, timeout=60).json()
    assert (pixels(answer["data"][0]["b64_json"]) == pixels(file_of(form))).all()
    kept = {"prompt": WORDS, "images": [{"image_url": f"{answer['job']}/image"}], "mask": body["mask"], **FAST}
    again = httpx.post(f"{drawing.url}/v1/images/edits", json=kept, timeout=60).json()
    assert (pixels(again["data"][0]["b64_json"]) == pixels(file_of(form))).all()


def test_a_variation_is_like_its_picture(client: OpenAI, source: bytes) -> None:
    answer: Any = client.images.create_variation(image=source, n=2, size="128x128", extra_body=FAST)  # type: ignore[call-overload]
    first, second = (pixels(each.b64_json) for each in answer.data)
    assert [each.seed for each in answer.data] == [5, 6]
    assert (first != second).any()
    assert (first != pixels(source)).any()
    near = client.images.create_variation(
        image=source, extra_body={"seed": 5, "num_inference_steps": 10, "strength": 0.3}
    )
    seen = read(pixels(file_of(near)))
    assert (seen.background, seen.things[0].color, seen.things[0].shape) == ("blue", "red", "circle")


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"image": ["source", "source"]}, "image"),
        ({"image": b"GIF89a"}, "image"),
        ({"mask": "source"}, "mask"),  # nothing of it is transparent
        ({"mask": half_transparent(np.zeros((64, 64, 3), np.uint8))}, "mask"),
        ({"mask": b"no image"}, "mask"),
        ({"size": "127x128"}, "size"),
        ({"n": 11}, "n"),
        ({"extra_body": {"num_inference_steps": "many"}}, "num_inference_steps"),
        ({"extra_body": {"strength": "NaN"}}, "strength"),
        ({"extra_body": {"size[]": "64x64"}, "size": "64x64"}, "size"),  # twice
        (
            {"extra_body": {"num_inference_steps": "9" * 400, "partial_images": 3, "stream": True}},
            "num_inference_steps",
        ),
        ({"extra_body": {"variables": {"color": "red"}}}, "variables"),
    ],
)
def test_what_is_wrong_with_a_form_is_named(client: OpenAI, source: bytes, asked: dict[str, Any], named: str) -> None:
    asked = {"image": source, "prompt": WORDS} | asked
    for name in ("image", "mask"):
        if asked.get(name) == "source":
            asked[name] = source
    if isinstance(asked["image"], list):
        asked["image"] = [source, source]
    with pytest.raises(UnprocessableEntityError) as refused:
        client.images.edit(**asked)
    assert (refused.value.param, refused.value.code) == (named, "invalid_value")
    assert refused.value.message.find(named) >= 0


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"images": [{"image_url": "data:,"}] * 2}, "images"),
        ({"images": [{"file_id": "file-1"}]}, "images"),
        ({"images": [{"image_url": "https://example.com/a.png"}]}, "images"),
        ({"images": "data:"}, "images"),
        ({"mask": {"file_id": "file-1"}, "image": "data:"}, "mask"),
        ({}, "image"),
        ({"n": "1"}, "n"),
    ],
)
def test_what_is_wrong_with_json_is_named(drawing: Drawing, body: dict[str, Any], named: str) -> None:
    answer = httpx.post(f"{drawing.url}/v1/images/edits", json={"prompt": WORDS, **body})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == named


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"),
        (b'{"a": "\xff"}', "application/json", 400, "invalid_request"),
        (b"[" * 100_000, "application/json", 400, "invalid_request"),
        (b"[]", "application/json", 422, "invalid_value"),
        (b"--x\r\nno header", "multipart/form-data; boundary=x", 400, "invalid_request"),
        (b"", "multipart/form-data", 400, "invalid_request"),
        (b"prompt=a", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b"prompt", "", 415, "unsupported_media_type"),
    ],
)
def test_a_body_that_cant_be_read_is_refused(drawing: Drawing, body: bytes, kind: str, status: int, code: str) -> None:
    answer = httpx.post(f"{drawing.url}/v1/images/edits", content=body, headers={"content-type": kind})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, "body")
