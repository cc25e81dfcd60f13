"""The three formats of a finished image: its pixels, its type, and what it says of itself."""

import io
import json
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from serve.domain.orders import ImageRequest
from serve.results.encode import encode_image, read_parameters
from serve.results.infotext import as_text
from serve.results.png import parameters
from serve.results.png16 import encode_png16

REQUEST = ImageRequest(
    model="shapes",
    prompt="a (réd:1.5) circle ☃\non blue",
    negative_prompt="green",
    width=64,
    height=48,
    num_inference_steps=20,
    guidance_scale=7.5,
    seed=7,
)
IMAGE = Image.linear_gradient("L").resize((64, 48)).convert("RGB")


def request(kind: str, **fields: Any) -> ImageRequest:
    return replace(REQUEST, output_format=kind, **fields)


def comment(data: bytes) -> str:
    """EXIF's UserComment, as A1111 reads it: eight bytes tell the encoding, UTF-16 in the order of the whole."""
    raw = Image.open(io.BytesIO(data)).getexif().get_ifd(0x8769)[0x9286]
    assert raw[:8] == b"UNICODE\0"
    return str(raw[8:].decode("utf-16-be"))


@pytest.mark.parametrize(
    ("kind", "content_type", "extension"),
    [("png", "image/png", "png"), ("jpeg", "image/jpeg", "jpg"), ("webp", "image/webp", "webp")],
)
def test_each_format_says_how_it_was_made(kind: str, content_type: str, extension: str) -> None:
    order = request(kind)
    told = parameters(order, 1, ("step_cache",))
    data, *kinds = encode_image(IMAGE, order, told)
    assert kinds == [content_type, extension]
    assert (data, *kinds) == encode_image(IMAGE, order, told)
    assert read_parameters(data) == told
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode, image.size) == (kind.upper(), "RGB", IMAGE.size)
    text = image.info["parameters"] if kind == "png" else comment(data)
    assert text == as_text(told)
    off = np.abs(np.asarray(image, int) - np.asarray(IMAGE, int)).max()
    assert off == 0 if kind == "png" else 0 < off < 16


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_a_lower_quality_is_a_smaller_file(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    sizes = [len(encode_image(noise, request(kind, output_compression=q), {})[0]) for q in (0, 50, 90, 100)]
    assert sizes == sorted(set(sizes))
    assert encode_image(noise, request(kind), {}) == encode_image(noise, request(kind, output_compression=90), {})


def test_what_a_jpeg_has_no_room_for_is_left_out_the_exact_form_last() -> None:
    for characters, exact, text in ((4_000, True, True), (18_000, True, False), (70_000, False, False)):
        order = request("jpeg", prompt='"' * characters, negative_prompt="")
        told = parameters(order, 0)
        data, _, _ = encode_image(IMAGE, order, told)
        exif = Image.open(io.BytesIO(data)).getexif()
        assert (exif.get(0x010E) == json.dumps(told)) is exact
        assert (0x9286 in exif.get_ifd(0x8769)) is text
        assert encode_image(IMAGE, replace(order, output_format="webp"), told)[1] == "image/webp"
    longest = request("jpeg", prompt="Я" * 4096, negative_prompt="Я" * 4096)  # of the default limits
    told = parameters(longest, 0)
    assert read_parameters(encode_image(IMAGE, longest, told)[0]) == told


@given(st.text(st.characters(codec="utf-8"), max_size=300), st.sampled_from(["png", "jpeg", "webp"]))
def test_every_prompt_comes_back(prompt: str, kind: str) -> None:
    told = parameters(request(kind, prompt=prompt), 0)
    assert read_parameters(encode_image(IMAGE, request(kind), told)[0]) == told


def deep(data: bytes) -> np.ndarray[Any, Any]:
    """The samples of a 16-bit PNG, by its specification alone: Pillow halves them."""
    width, height, depth, colour, *rest = np.frombuffer(data[16:29], ">u4,>u4,u1,u1,u1,u1,u1")[0].item()
    assert (depth, colour, rest) == (16, 2, [0, 0, 0])
    place, packed = 8, b""
    while place < len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + size]
        assert int.from_bytes(data[place + 8 + size : place + 12 + size], "big") == zlib.crc32(kind + body)
        packed += body if kind == b"IDAT" else b""
        place += 12 + size
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * 6)
    before, found = np.zeros(width * 6, np.uint8), []
    for kind, *row in rows.tolist():
        line = np.array(row, np.uint8)
        if kind == 1:
            line = np.add.accumulate(line.reshape(width, 6), axis=0, dtype=np.uint8).reshape(-1)
        else:
            assert kind == 2
            line = line + before
        found.append(line)
        before = line
    return np.stack(found).view(">u2").reshape(height, width, 3).astype(np.uint16)


@given(arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_sixteen_bits_are_sixteen_bits(pixels: np.ndarray[Any, Any]) -> None:
    data = encode_png16(pixels)
    assert (deep(data) == pixels).all()
    with Image.open(io.BytesIO(data)) as image:
        assert (np.asarray(image) == pixels >> 8).all()


def test_a_deep_png_says_how_it_was_made_and_packs_well() -> None:
    order = request("png", bit_depth=16)
    told = parameters(order, 0)
    smooth = np.add.outer(np.arange(48) * 300, np.arange(64) * 700)[..., None] + np.array([0, 100, 200])
    pixels = smooth.astype(np.uint16)
    data, content_type, extension = encode_image(pixels, order, told)
    assert (content_type, extension) == ("image/png", "png")
    assert read_parameters(data) == told
    assert Image.open(io.BytesIO(data)).info["parameters"] == as_text(told)
    assert (deep(data) == pixels).all()
    assert len(data) < pixels.nbytes / 4
