"""What pictures say of themselves, ours and anybody's."""

import contextlib
import io
import json
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from serve.domain.orders import ImageRequest
from serve.errors import InvalidRequest
from serve.results.encode import encode_image, read_parameters
from serve.results.infotext import as_text
from serve.results.notes import MOST, read_notes
from serve.results.png import JSON_CHUNK, encode_png, parameters, retold
from serve.results.png16 import encode_png16

IMAGE = Image.new("RGB", (8, 8), "red")
TEXT = "一只猫\nSteps: 4, Seed: 1, Size: 8x8"


def request(output_format: str, prompt: str = "a cat") -> ImageRequest:
    return ImageRequest(
        model="shapes",
        prompt=prompt,
        width=8,
        height=8,
        num_inference_steps=4,
        guidance_scale=5.0,
        seed=1,
        output_format=output_format,
    )


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("prompt", ["a cat", "一只猫", "Ā, ÿ and 🐈"])
def test_our_own_pictures(kind: str, prompt: str) -> None:
    told = parameters(request(kind, prompt), 0)
    notes = read_notes(encode_image(IMAGE, request(kind), told)[0])
    assert notes.info == as_text(told)
    exact = notes.items[JSON_CHUNK if kind == "png" else "ImageDescription"]
    assert json.loads(exact) == told


def commented(comment: bytes, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    file = io.BytesIO()
    IMAGE.save(file, kind, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + TEXT.encode("utf-16-be"),
        b"UNICODE\0" + TEXT.encode("utf-16-le"),
        b"UNICODE\0" + TEXT.encode("utf-16"),
        bytes(8) + TEXT.encode() + b"\0",
        b"ASCII\0\0\0" + TEXT.encode(),
        TEXT.encode(),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_comments_as_others_write_them(comment: bytes, kind: str) -> None:
    assert read_notes(commented(comment, kind)).info == TEXT


def test_a_picture_that_says_nothing() -> None:
    file = io.BytesIO()
    IMAGE.save(file, "PNG")
    assert read_notes(file.getvalue()).info == ""
    assert read_notes(commented(b"")).info == ""


def chunked(kind: bytes, *bodies: bytes) -> bytes:
    """A PNG with these chunks before its pixels."""
    data = encode_png(IMAGE, {})
    added = b"".join(
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big") for body in bodies
    )
    return data[:33] + added + data[33:]


def test_texts_of_a_png_in_every_form_it_has() -> None:
    assert read_notes(chunked(b"zTXt", b"Comment\0\0" + zlib.compress(b"packed"))).items["Comment"] == "packed"
    iso = chunked(b"iTXt", b"Comment\0\1\0en\0\0" + zlib.compress("gepackt: ü".encode()))
    assert read_notes(iso).items["Comment"] == "gepackt: ü"
    assert read_notes(chunked(b"tEXt", b"Comment\0a", b"Comment\0b")).items["Comment"] == "b"


def test_texts_behind_the_pixels_are_read_too() -> None:
    data = chunked(b"tEXt", b"Comment\0late")
    chunk, start, end = data[33:57], data[:33], data[57:]
    assert chunk[4:8] == b"tEXt"
    assert read_notes(start + end[:-12] + chunk + end[-12:]).items["Comment"] == "late"


def test_what_is_packed_to_burst_is_refused() -> None:
    bomb = zlib.compress(bytes(1 << 24))
    for data in (
        chunked(b"zTXt", b"Comment\0\0" + bomb),
        chunked(b"iTXt", b"Comment\0\1\0\0\0" + bomb),
        chunked(b"zTXt", *(b"c%d\0\0" % n + zlib.compress(bytes(1 << 19)) for n in range(3))),
    ):
        with pytest.raises(InvalidRequest) as refused:
            read_notes(data)
        assert refused.value.param == "image"
        assert "more of itself" in refused.value.message
    almost = chunked(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (MOST - 100)))
    assert len(read_notes(almost).items["Comment"]) == MOST - 100


@given(st.binary(max_size=300))
def test_no_file_does_more_than_be_refused(tail: bytes) -> None:
    for head in (b"", encode_png(IMAGE, {})[:33], commented(b"ASCII\0\0\0x")[:30], b"RIFF\0\0\0\0WEBPVP8X"):
        with contextlib.suppress(InvalidRequest):
            read_notes(head + tail)


EXIF = commented(b"UNICODE\0" + TEXT.encode("utf-16-be"), "WEBP")
PLACES = st.integers(EXIF.index(b"EXIF") + 4, len(EXIF) - 1)


@given(st.dictionaries(PLACES, st.integers(0, 255), min_size=1, max_size=6))
def test_no_exif_does_more_than_be_refused(garbled: dict[int, int]) -> None:
    data = bytearray(EXIF)
    for place, value in garbled.items():
        data[place] = value
    with contextlib.suppress(InvalidRequest):
        read_notes(bytes(data))


@pytest.mark.parametrize("text", ["plain", TEXT, 'a "text"\nSteps: 1', "\ud800"])
def test_a_png_says_another_text_and_is_the_same_picture(text: str) -> None:
    for told in ({"prompt": "a cat"}, {"prompt": "一只猫"}):
        data = encode_png(IMAGE, told)
        other = retold(data, text)
        assert read_notes(other).info == text.encode("utf-8", "replace").decode()
        assert read_parameters(other) == told
        assert Image.open(io.BytesIO(other)).tobytes() == IMAGE.tobytes()
        assert other.count(b"parameters\0") == 1
        assert other[other.index(b"IDAT") :] == data[data.index(b"IDAT") :]


def test_a_deep_png_is_retold_and_other_files_stay() -> None:
    deep = encode_png16(np.full((8, 8, 3), 999, np.uint16), [(b"tEXt", b"parameters\0old")])
    assert read_notes(retold(deep, "new")).info == "new"
    data = commented(b"ASCII\0\0\0x")
    assert retold(data, "new") is data
