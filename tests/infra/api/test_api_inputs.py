"""Orders that start from an image: what is kept of it, how it is named, and what is left of a refused one."""

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.anyio
SIZE = (72, 64)


def file(kind: str = "PNG", size: tuple[int, int] = SIZE, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def kept(folder: Path) -> int:
    return len(list(folder.rglob("*.png")))


async def test_what_a_job_starts_from_is_kept_as_a_picture_of_its_size(stand: Any) -> None:
    image = f"data:image/jpeg;base64,{text(file('JPEG', (145, 130)))}"
    job = await stand.create(image=image, mask=text(file("WEBP", (145, 130))), width=64, height=72, num_images=2)
    order = job["request"]
    assert (order["width"], order["height"], order["strength"]) == (64, 72, 1.0)
    assert (order["image"], order["mask"]) == (f"{job['id']}/image", f"{job['id']}/mask")
    image, mask = [await stand.client.get(f"/v1/images/{order[field]}") for field in ("image", "mask")]
    assert image.headers["content-type"] == "image/png"
    assert (decoded(image.content).mode, decoded(image.content).size) == ("RGB", (64, 72))
    assert (decoded(mask.content).mode, decoded(mask.content).size) == ("L", (64, 72))
    assert set(decoded(mask.content).tobytes()) == {0, 255}


async def test_the_request_of_a_job_that_started_from_an_image_repeats_it(stand: Any) -> None:
    job = await stand.create(image=text(file()), strength=0.5)
    again = await stand.create(**job["request"])
    assert again["request"] == job["request"] | {"image": f"{again['id']}/image"}
    pictures = [(await stand.client.get(f"/v1/images/{each}/image")).content for each in (job["id"], again["id"])]
    assert pictures[0] == pictures[1]


async def test_a_picture_that_was_drawn_is_the_next_one_s_start(stand: Any) -> None:
    first = await stand.create(num_inference_steps=2)
    await stand.finish(first["id"], data=file())
    job = await stand.create(image=f"{first['id']}/0")
    assert (job["request"]["width"], job["request"]["height"]) == SIZE
    assert job["request"]["strength"] == 0.8
    assert decoded((await stand.client.get(f"/v1/images/{job['id']}/image")).content).size == SIZE


async def test_a_picture_that_is_gone_names_the_field(stand: Any, refused: Any) -> None:
    first = await stand.create(num_inference_steps=2)
    order = {"prompt": "a red circle", "image": text(file())}
    for field, place in (("image", "0"), ("image", "image"), ("mask", "mask"), ("mask", "9999")):
        answer = await stand.client.post("/v1/jobs", json=order | {field: f"{first['id']}/{place}"})
        refused(answer, 404, field)
    await stand.finish(first["id"])
    await stand.results.delete(f"{first['id']}/0.png")
    refused(await stand.client.post("/v1/jobs", json=order | {"image": f"{first['id']}/0"}), 404, "image")
    refused(await stand.client.get(f"/v1/images/{first['id']}/image"), 404, "index")


@pytest.mark.parametrize(
    ("order", "param"),
    [
        ({"image": text(file("GIF"))}, "image"),
        ({"image": text(b"<svg xmlns='http://www.w3.org/2000/svg'/>")}, "image"),
        ({"image": text(file(size=(1, 1)))}, "image"),
        ({"image": text(file()[:-60])}, "image"),
        ({"image": text(file()), "mask": text(file("JPEG")[:-200])}, "mask"),
        ({"image": text(file()), "mask": text(file(size=(64, 64)))}, "mask"),
        ({"image": text(file()), "strength": 0}, "strength"),
        ({"image": text(file()), "strength": 1.01}, "strength"),
        ({"image": text(file()), "strength": 0.1, "num_inference_steps": 5}, "strength"),
        ({"image": text(file(size=(4000, 64)))}, "image"),
        ({"mask": text(file())}, "mask"),
    ],
)
async def test_a_bad_image_is_refused_by_name_and_leaves_nothing(
    stand: Any, refused: Any, tmp_path: Path, order: dict[str, Any], param: str
) -> None:
    answer = await stand.client.post("/v1/jobs", json={"prompt": "a red circle"} | order)
    assert param in refused(answer, 422, param)["message"]
    assert await stand.jobs.queue_depth() == 0
    assert kept(tmp_path) == 0


async def test_an_order_that_finds_no_place_leaves_nothing(
    redis_url: str, tmp_path: Path, stand_on: Any, refused: Any
) -> None:
    async with stand_on(redis_url, tmp_path, max_queued=1) as stand:
        await stand.create(image=text(file()))
        answer = await stand.client.post("/v1/jobs", json={"prompt": "one more", "image": text(file())})
        assert refused(answer, 503, answer.json()["error"]["param"])["code"] == "queue_full"
        assert kept(tmp_path) == 1
