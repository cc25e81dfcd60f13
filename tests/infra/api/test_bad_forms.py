"""Forms with files in them, as OpenAI's clients send them: what is wrong with one is refused by its field, its size is
bounded before it is read, and no more pictures are decoded at a time than anywhere else."""

import asyncio
import base64
import threading
from typing import Any

import pytest
from PIL import Image
from support.dialects import A1111, OPENAI, refused
from support.pictures import bomb, png, written
from support.speaking import Speaking

from serve import images
from serve.inputs import DECODINGS

GIF = png(kind="GIF")
URL = "http://169.254.169.254/latest/meta-data"


def form(speaking: Speaking, status: int, **parts: Any) -> str | None:
    """The field at fault of a form that must be refused."""
    path = "/v1/images/edits"
    return refused(speaking, OPENAI, status, path, **parts)[1]


@pytest.mark.parametrize(
    ("files", "fields", "param"),
    [
        ([], {}, "image"),
        ([("image", ("a.png", b""))], {}, "image"),
        ([("image", ("a.gif", GIF, "image/gif"))], {}, "image"),
        ([("image", ("a.png", GIF, "image/png"))], {}, "image"),
        ([("image", ("a.png", base64.b64decode(bomb())))], {}, "image"),
        ([("image", ("a.png", png()[:-60]))], {}, "image"),
        ([("image", ("../../etc/passwd", b"root:x:0:0"))], {}, "image"),
        ([("image", ("a.png", png())), ("image", ("b.png", png()))], {}, "image"),
        ([("image[]", ("a.png", png())), ("image[]", ("b.png", png()))], {}, "image"),
        ([("image", ("a.png", png())), ("mask", ("m.png", png(size=(72, 64), mode="RGBA")))], {}, "mask"),
        ([("image", ("a.png", png())), ("mask", ("m.png", base64.b64decode(bomb())))], {}, "mask"),
        ([("image", ("a.png", png()))], {"image_url": URL, "n": "many"}, "n"),
        ([("image", ("a.png", png()))], {"seed": "NaN"}, "seed"),
        ([("image", ("a.png", png()))], {"guidance_scale": "inf"}, "guidance_scale"),
        ([("image", ("a.png", png()))], {"prompt": "a\x00b"}, "prompt"),
        ([("image", ("a.png", png()))], {"size": "huge"}, "size"),
    ],
)
def test_a_bad_form_is_refused_by_its_field(
    files: list[Any], fields: dict[str, str], param: str, speaking: Speaking
) -> None:
    sent = files or [("nothing", ("a", b"a"))]
    assert form(speaking, 422, files=sent, data={"prompt": "a red circle"} | fields) == param


KIND = {"content-type": "multipart/form-data; boundary=x"}
PART = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na'


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", {"content-type": "multipart/form-data"}),
        (PART, {"content-type": "multipart/form-data"}),
        (b"no part at all", KIND),
        (b"--x\r\nContent-Disposition: " + b"x" * 100_000, KIND),
        ((PART + b"\r\n") * 1000 + b"--x--", KIND),
        (PART + b"x" * (2 << 20) + b"\r\n--x--", KIND),
        (b"".join(PART.replace(b'"prompt"', b'"f"; filename="%d"' % each) + b"\r\n" for each in range(100)), KIND),
    ],
    ids=["empty", "no boundary", "no part", "a long header", "many fields", "a long field", "many files"],
)
def test_what_is_no_form_is_refused(body: bytes, headers: dict[str, str], speaking: Speaking) -> None:
    assert form(speaking, 400, content=body, headers=headers) == "body"


def test_a_form_over_the_bound_is_refused_before_it_is_read(speaking: Speaking) -> None:
    read = []

    async def endless() -> Any:
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        while True:
            read.append(1)
            yield bytes(1 << 20)

    assert form(speaking, 413, content=b"x" * (33 << 20), headers=KIND) == "body"
    assert form(speaking, 413, content=endless(), headers=KIND) == "body"
    assert len(read) <= 33


def test_no_dialect_decodes_more_pictures_at_a_time_than_two(
    speaking: Speaking, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most, lock, plain = 0, 0, threading.Lock(), images._pixels

    def counted(*upload: Any) -> Image.Image:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        try:
            return plain(*upload)
        finally:
            with lock:
                inside -= 1

    monkeypatch.setattr(images, "_pixels", counted)
    large = {"size": (512, 512), "mode": "RGBA"}
    text = written(**large)
    orders = [dialect.order(prompt="a", image=text, width=64, height=64) for dialect in (OPENAI, A1111)]

    async def all_at_once() -> list[Any]:
        client, files = speaking.stand.client, {"image": ("a.png", png(**large))}
        sent = [
            client.post(path, content=body, headers={"content-type": "application/json"})
            for path, body in orders
            for _ in range(3)
        ]
        sent += [client.post("/v1/images/edits", data={"prompt": "a", "size": "64x64"}, files=files) for _ in range(3)]
        return await asyncio.gather(*sent)

    assert [answer.status_code for answer in speaking.run(all_at_once())] == [200] * 9
    assert most == DECODINGS
