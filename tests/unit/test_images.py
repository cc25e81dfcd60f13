"""Images and masks from strangers: what is read, what is refused by name, what is left of a file."""

import base64
import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from serve.domain.orders import ResizeMode
from serve.errors import InvalidRequest
from serve.image_files import MAX_CHUNKS, MAX_SCANS, MAX_SEGMENTS
from serve.images import image_png, inspect, mask_png, written_file
from serve.settings.orders import LimitSettings

LIMITS = LimitSettings()
SIZE = (24, 16)


def picture(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    noise = np.random.default_rng(5).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    noise[..., 3] |= 1
    return Image.fromarray(noise, "RGBA").convert("RGB").convert(mode) if mode != "RGBA" else Image.fromarray(noise)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def drawn(data: bytes, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.open(io.BytesIO(image_png(inspect("image", data, LIMITS), *size)))


def refusal(data: bytes, limits: LimitSettings = LIMITS, field: str = "image") -> str:
    """Why the file is refused, at its header or when it is decoded."""
    with pytest.raises(InvalidRequest) as refused:
        image_png(inspect(field, data, limits), *SIZE)
    assert refused.value.param == field
    return refused.value.message


@pytest.mark.parametrize(("kind", "mode"), [("PNG", m) for m in ("1", "L", "LA", "P", "RGB", "RGBA")])
def test_every_kind_of_png_is_what_pillow_makes_rgb_of_it(kind: str, mode: str) -> None:
    data = saved(picture(mode), kind)
    assert drawn(data).mode == "RGB"
    assert drawn(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_and_webp(mode: str) -> None:
    data = saved(picture(mode), "JPEG", progressive=True)
    assert drawn(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    for lossless in (True, False):
        data = saved(picture("RGBA"), "WEBP", lossless=lossless)
        assert drawn(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_of_sixteen_bits_the_upper_eight_are_kept() -> None:
    deep = np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE[::-1]) * 170
    red = np.asarray(drawn(saved(Image.fromarray(deep))))[..., 0]
    assert (red == deep >> 8).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_a_picture_is_held_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture(), kind, exif=exif)
    upright = Image.open(io.BytesIO(data))
    upright = ImageOps.exif_transpose(upright).convert("RGB")
    upload = inspect("image", data, LIMITS)
    assert (upload.width, upload.height) == upright.size
    assert drawn(data, upright.size).tobytes() == upright.tobytes()


def test_an_image_is_resized_as_diffusers_does_it() -> None:
    big = picture(size=(70, 50))
    stock = VaeImageProcessor(vae_scale_factor=8, do_normalize=False).preprocess(big, height=16, width=24)
    ours = np.asarray(drawn(saved(big))).astype(np.float32).transpose(2, 0, 1) / 255
    assert np.abs(stock.numpy()[0] - ours).max() < 1e-6


@pytest.mark.parametrize("size", [SIZE, (70, 50)])
def test_a_mask_is_made_as_diffusers_does_it(size: tuple[int, int]) -> None:
    grey = picture("L", size)
    processor = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    stock = processor.preprocess(grey, height=16, width=24).numpy()[0, 0]
    mask = Image.open(io.BytesIO(mask_png(inspect("mask", saved(grey), LIMITS), *SIZE)))
    assert mask.mode == "L"
    assert (np.asarray(mask) == stock * 255).all()


@pytest.mark.parametrize("size", [(70, 50), (50, 70), (300, 9), (9, 300), (70, 47)])
@pytest.mark.parametrize("target", [(24, 16), (16, 24), (32, 32), (96, 80)])
def test_a_picture_that_is_cropped_keeps_its_ratio_and_fills_the_size(
    size: tuple[int, int], target: tuple[int, int]
) -> None:
    upload = inspect("image", saved(picture(size=size)), LIMITS)
    ours = np.asarray(Image.open(io.BytesIO(image_png(upload, *target, ResizeMode.CROP))), dtype=int)
    scale = max(target[0] / size[0], target[1] / size[1])
    shown = target[0] / scale, target[1] / scale
    left, top = max(0.0, (size[0] - shown[0]) / 2), max(0.0, (size[1] - shown[1]) / 2)
    box = (left, top, left + shown[0], top + shown[1])
    expected = picture(size=size).resize(target, Image.Resampling.LANCZOS, box=box)
    assert np.abs(ours - np.asarray(expected, dtype=int)).max() <= 1


@pytest.mark.parametrize(("size", "target"), [((70, 50), (24, 40)), ((50, 70), (41, 24)), ((300, 8), (16, 24))])
def test_a_picture_that_is_filled_up_is_all_there_and_its_edges_go_on(
    size: tuple[int, int], target: tuple[int, int]
) -> None:
    upload = inspect("image", saved(picture(size=size)), LIMITS)
    ours = Image.open(io.BytesIO(image_png(upload, *target, ResizeMode.FILL)))
    scale = min(target[0] / size[0], target[1] / size[1])
    inner = [max(1, round(side * scale)) for side in size]
    left, top = [(whole - part) // 2 for whole, part in zip(target, inner, strict=True)]
    shown = ours.crop((left, top, left + inner[0], top + inner[1]))
    whole = picture(size=size).resize((inner[0], inner[1]), Image.Resampling.LANCZOS)
    assert shown.tobytes() == whole.tobytes()
    pixels, middle = np.asarray(ours), np.asarray(shown)
    if inner[0] == target[0]:
        assert min(top, target[1] - top - inner[1]) > 0
        assert (pixels[:top] == middle[:1]).all()
        assert (pixels[top + inner[1] :] == middle[-1:]).all()
    else:
        assert min(left, target[0] - left - inner[0]) > 0
        assert (pixels[:, :left] == middle[:, :1]).all()
        assert (pixels[:, left + inner[0] :] == middle[:, -1:]).all()


@pytest.mark.parametrize("mode", ResizeMode)
def test_a_mask_lies_on_its_image_whatever_becomes_of_both(mode: ResizeMode) -> None:
    white = np.zeros((50, 70), np.uint8)
    white[10:30, 20:60] = 255
    grey = Image.fromarray(white)
    image = image_png(inspect("image", saved(grey.convert("RGB")), LIMITS), 40, 64, mode)
    upload = inspect("mask", saved(grey), LIMITS)
    mask = np.asarray(Image.open(io.BytesIO(mask_png(upload, 40, 64, mode))))
    assert (mask == np.where(np.asarray(Image.open(io.BytesIO(image)))[..., 0] >= 128, 255, 0)).all()
    assert 0.05 < (mask == 255).mean() < 0.6
    turned = np.asarray(Image.open(io.BytesIO(mask_png(upload, 40, 64, mode, invert=True))))
    assert (turned == 255 - mask).all()


def test_nothing_of_the_file_but_its_pixels_survives() -> None:
    notes = PngInfo()
    notes.add_text("secret", "a note")
    data = saved(picture(), "PNG", pnginfo=notes, icc_profile=b"secret profile" * 20, exif=b"Exif\0\0secret")
    kept = image_png(inspect("image", data + b"PK\x03\x04 secret archive", LIMITS), *SIZE)
    assert b"secret" not in kept
    assert Image.open(io.BytesIO(kept)).info == {}
    assert b"iCCP" not in kept


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "empty"),
        (b"hello", "no image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><!-- x --><svg/>", "SVG"),
        (saved(picture(), "GIF"), "GIF"),
        (saved(picture(), "BMP"), "BMP"),
        (saved(picture(), "TIFF"), "TIFF"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x20ftypavif", "AVIF"),
        (saved(picture(size=(1, 1))), "8 pixels or more"),
        (saved(picture(size=(400, 7)), "JPEG"), "8 pixels or more"),
        (saved(picture(), "PNG", save_all=True, append_images=[picture("L").convert("RGB")]), "animated"),
        (saved(picture(), "WEBP", save_all=True, append_images=[picture("L").convert("RGB")]), "animated"),
        (saved(picture(), "WEBP")[:40], "broken"),
        (saved(picture(), "JPEG")[:300], "broken"),
        (saved(picture())[:200], "broken"),
        (saved(picture())[:24], "broken"),
        (saved(picture(), "JPEG") + b"\xff\xda" * MAX_SCANS, "scans"),
        (saved(picture("CMYK"), "JPEG"), "CMYK"),
        (saved(picture("CMYK"), "JPEG", progressive=True), "CMYK"),
    ],
)
def test_what_is_not_read_is_refused_by_name(data: bytes, named: str) -> None:
    assert named in refusal(data)


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises that size, and whose pixels are not there."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def webp_of(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + bytes(12)


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(saved(picture(), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    "data", [png_of(100_000, 100_000), png_of(2**31 - 1, 2**31 - 1), webp_of(16_384, 16_384), jpeg_of(65_500, 65_500)]
)
def test_a_bomb_is_refused_before_it_is_decoded(data: bytes) -> None:
    assert f"at most {LIMITS.max_image_pixels} pixels" in refusal(data)


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("kind", [b"tEXt", b"IDAT", b"eXIf", b"zzzz"])
def test_a_flood_of_chunks_is_refused_before_a_decoder_sees_it(kind: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(picture())
    flood = chunk(kind) * MAX_CHUNKS
    monkeypatch.setattr("serve.images._OPEN", {})
    assert f"more than {MAX_CHUNKS} chunks" in refusal(data[:33] + flood + data[33:])
    segment = b"\xff\xe1\0\2"
    jpeg = saved(picture(), "JPEG")
    for filler in (segment, b"\xff"):
        assert f"more than {MAX_SEGMENTS} segments" in refusal(jpeg[:2] + filler * MAX_SEGMENTS + jpeg[2:])
    webp = saved(picture(), "WEBP", exif=b"Exif\0\0none")
    assert f"more than {MAX_SEGMENTS} chunks" in refusal(webp[:30] + b"zzzz\0\0\0\0" * MAX_SEGMENTS + webp[30:])


def test_junk_between_segments_is_refused_at_its_first_byte() -> None:
    jpeg = saved(picture(), "JPEG")
    assert "broken" in refusal(jpeg[:20] + bytes(1000) + jpeg[20:])


def noted(kind: str, exif: bytes) -> bytes:
    """A picture with such EXIF."""
    if kind != "PNG":
        return saved(picture(), kind, exif=b"Exif\0\0" + exif)
    data = saved(picture())
    return data[:33] + chunk(b"eXIf", exif) + data[33:]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("order", [b"MM\0*", b"II*\0"])
def test_of_what_exif_says_the_orientation_alone_is_read(
    kind: str, order: bytes, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    caplog.set_level("DEBUG")
    form = ">" if order[:1] == b"M" else "<"
    wild = [struct.pack(f"{form}HHII", 0x9C9B, 7, 2**31, 2**31 + n) for n in range(200)]  # lengths that lie
    turned = struct.pack(f"{form}HHIHH", 0x0112, 3, 1, 6, 0)
    exif = order + struct.pack(f"{form}IH", 8, 201) + b"".join([*wild, turned]) + bytes(4)
    upload = inspect("image", noted(kind, exif), LIMITS)
    assert (upload.width, upload.height) == SIZE[::-1]
    assert Image.open(io.BytesIO(image_png(upload, *SIZE[::-1]))).size == SIZE[::-1]
    assert (len(recwarn), [record for record in caplog.records if record.levelname != "DEBUG"]) == (0, [])
    for broken in (exif[:30], b"??" + exif, exif[:4] + b"\xff" * 4 + exif[8:], order + bytes(20)):
        assert inspect("image", noted(kind, broken), LIMITS).width == SIZE[0]
    late = order + struct.pack(f"{form}IH", 8, 400) + b"".join([*wild, *wild[1:], turned]) + bytes(4)
    assert inspect("image", noted(kind, late), LIMITS).orientation == 1


def test_the_limits_are_the_settings() -> None:
    data = saved(picture(size=(128, 128)))
    assert "4096 pixels" in refusal(data, LimitSettings(max_image_pixels=4096), "mask")
    assert "over 1024 bytes" in refusal(data, LimitSettings(max_image_bytes=1024))
    with pytest.raises(InvalidRequest, match="over 1024 bytes"):
        written_file("image", base64.b64encode(data).decode(), LimitSettings(max_image_bytes=1024))


def test_a_file_is_written_as_base64_or_as_a_data_url() -> None:
    data = saved(picture())
    plain = base64.b64encode(data).decode()
    for text in (plain, f"data:image/png;base64,{plain}", f"DATA:image/webp;name=a.png;BASE64,{plain}"):
        assert written_file("image", text, LIMITS) == data


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("https://example.com/a.png", "not fetched"),
        ("file:///etc/passwd", "not fetched"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "SVG"),
        ("data:text/html;base64,AAAA", "data URL"),
        ("data:image/png,%89PNG", "data URL"),
        ("data:image/png;base64", "data URL"),
        ("data:", "data URL"),
        ("AAA", "base64"),
        ("AA\nAA", "base64"),
        ("é", "base64"),
        ("\ud800AAA", "base64"),
    ],
)
def test_what_is_no_file_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named) as refused:
        written_file("mask", text, LIMITS)
    assert refused.value.param == "mask"


FILES = [
    saved(picture()),
    saved(picture("P")),
    saved(picture("CMYK"), "JPEG", progressive=True),
    saved(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    saved(picture("RGBA"), "WEBP"),
    saved(picture(), "WEBP", lossless=True),
    saved(picture(), "PNG", save_all=True, append_images=[picture("L").convert("RGB")]),
]


@contextlib.contextmanager
def refusing(field: str) -> Iterator[None]:
    """The block may refuse, by name and in fit words; it raises nothing else."""
    refused = None
    try:
        yield
    except InvalidRequest as error:
        refused = error
    assert refused is None or (refused.param == field and refused.message.isprintable())


@settings(max_examples=600, deadline=None)
@given(
    data=st.sampled_from(FILES),
    changes=st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=6)), max_size=6),
    cut=st.none() | st.integers(0, 5000),
    mode=st.sampled_from(ResizeMode),
)
def test_no_file_breaks_the_decoder(
    data: bytes, changes: list[tuple[int, bytes]], cut: int | None, mode: ResizeMode
) -> None:
    broken = bytearray(data)
    for place, value in changes:
        place %= len(broken)
        broken[place : place + len(value)] = value
    with refusing("image"):
        upload = inspect("image", bytes(broken[:cut]), LIMITS)
        for make in (image_png, mask_png):
            assert Image.open(io.BytesIO(make(upload, *SIZE, mode))).size == SIZE


@given(text=st.text(max_size=60) | st.binary(max_size=60).map(lambda data: base64.b64encode(data).decode()))
def test_no_text_breaks_the_reading(text: str) -> None:
    with refusing("mask"):
        inspect("mask", written_file("mask", text, LIMITS), LIMITS)
