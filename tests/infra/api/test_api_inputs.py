"""Orders that start from an image: what is kept of it, how it is named, and what is left of a refused one."""

import asyncio
import base64
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serve.errors import JobNotFound
from serve.inputs import DECODINGS, Inputs, Pictures, settled
from serve.jobs.store import JobStore
from serve.orders import NewImage
from serve.results.local import LocalStore
from serve.settings.orders import LimitSettings
from serve.settings.stores import CacheSettings

pytestmark = pytest.mark.anyio
SIZE = (72, 64)


def file(kind: str = "PNG", size: tuple[int, int] = SIZE, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def png_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
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


@pytest.mark.parametrize("mode", ["crop", "fill"])
async def test_image_and_mask_are_kept_as_they_are_to_be_used(stand: Any, mode: str) -> None:
    """And repeating the request changes neither once more."""
    left = Image.new("L", (100, 200), 255)
    left.paste(0, (0, 0, 50, 200))
    pictures = {"image": text(file(size=(100, 200))), "mask": text(png_of(left))}
    size = {"width": 64, "height": 64}
    job = await stand.create(**pictures, **size, resize_mode=mode, mask_invert=True, mask_blur=4, seed=1)
    assert job["request"]["mask_blur"] == 4.0
    again = await stand.create(**job["request"])
    for each in (job["id"], again["id"]):
        kept = [(await stand.client.get(f"/v1/images/{each}/{field}")).content for field in ("image", "mask")]
        image, mask = [np.asarray(decoded(data)) for data in kept]
        # A gradient from the top to the bottom: of a crop the upper and lower quarters are gone.
        assert (image.shape, image[0].max() < 30) == ((64, 64, 3), mode == "fill")
        assert (mask[:, :31] == 255).all()
        assert (mask[:, 33:] == 0).all()


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
        ({"image": text(file("JPEG", mode="CMYK"))}, "image"),
        ({"image": text(file()), "mask": text(file("JPEG", mode="CMYK"))}, "mask"),
        ({"image": text(file()), "mask": text(file("JPEG")[:-200])}, "mask"),
        ({"image": text(file()), "mask": text(file(size=(64, 64)))}, "mask"),
        ({"image": text(file()), "strength": 0}, "strength"),
        ({"image": text(file()), "strength": 1.01}, "strength"),
        ({"image": text(file()), "strength": 0.1, "num_inference_steps": 5}, "strength"),
        ({"image": text(file(size=(4000, 64)))}, "image"),
        ({"mask": text(file())}, "mask"),
        ({"mask_blur": 4}, "mask_blur"),
        ({"image": text(file()), "padding_mask_crop": 0}, "padding_mask_crop"),
        ({"image": text(file()), "masked_content": "fill"}, "masked_content"),
        ({"image": text(file()), "mask_invert": True}, "mask_invert"),
        ({"resize_mode": "crop"}, "resize_mode"),
        ({"image": text(file()), "resize_mode": "latent"}, "resize_mode"),
        ({"image": text(file()), "variation_strength": 1.5}, "variation_strength"),
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


async def test_another_tenant_s_picture_is_one_that_there_is_not(
    redis_url: str, tmp_path: Path, stand_on: Any, refused: Any
) -> None:
    async with stand_on(redis_url, tmp_path, cache=CacheSettings(salt_header="x-tenant")) as stand:

        async def order(tenant: dict[str, str], **fields: str) -> Any:
            return await stand.client.post("/v1/jobs", json={"prompt": "a", "strength": 0.5} | fields, headers=tenant)

        mine, theirs = {"x-tenant": "one"}, {"x-tenant": "two"}
        job = (await order(mine, image=text(file()), mask=text(file()))).json()
        image, mask = f"{job['id']}/image", f"{job['id']}/mask"
        assert (await order(mine, image=image, mask=mask)).status_code == 202
        for other in (theirs, {}):
            told = refused(await order(other, image=image), 404, "image")
            unknown = refused(await order(other, image=f"{'0' * 32}/image"), 404, "image")
            assert told == unknown
            refused(await order(other, image=text(file()), mask=mask), 404, "mask")
        public = (await order({}, image=text(file()))).json()
        assert (await order({}, image=f"{public['id']}/image")).status_code == 202
        refused(await order(theirs, image=f"{public['id']}/image"), 404, "image")


class SlowStore(LocalStore):
    """The real store, whose thread waits before its file is there."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def _put(self, path: Path, data: bytes) -> None:
        self.begun.set()
        assert self.go_on.wait(20)
        super()._put(path, data)


async def test_a_cancelled_submission_leaves_no_file_however_slow_the_disk(stand: Any, tmp_path: Path) -> None:
    store = SlowStore(tmp_path / "images")
    stand.app.state.service._inputs._results = store
    order = NewImage(prompt="a red circle", image=text(file()), mask=text(file()))
    submitting = asyncio.create_task(stand.app.state.service.submit(order))
    assert await asyncio.to_thread(store.begun.wait, 20)
    submitting.cancel()
    await asyncio.sleep(0)
    submitting.cancel()  # again, while it waits for the thread
    assert kept(tmp_path) == 0
    store.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    assert not list((tmp_path / "images").rglob("*.*"))
    assert await stand.jobs.queue_depth() == 0


class CancelledAt(LocalStore):
    """The real store, which has a task cancelled when its mask is put, and again at every deletion."""

    task: asyncio.Task[Any]
    puts = 0

    async def put(self, key: str, data: bytes, content_type: str) -> Any:
        self.puts += 1
        if "mask" in key:
            self.task.cancel()
            await asyncio.sleep(0)
        return await super().put(key, data, content_type)

    async def delete(self, key: str) -> None:
        self.task.cancel()
        await asyncio.sleep(0)
        await super().delete(key)


async def test_a_second_cancellation_does_not_stop_the_clearing_up(stand: Any, tmp_path: Path) -> None:
    store = CancelledAt(tmp_path / "images")
    inputs = Inputs(stand.jobs, store, LimitSettings())
    uploads = await inputs.read(NewImage(prompt="a", image=text(file()), mask=text(file())), "")
    store.task = asyncio.create_task(inputs.keep(Pictures("0" * 32, uploads), 64, 64))
    with pytest.raises(asyncio.CancelledError):
        await store.task
    assert store.puts == 2
    assert not list((tmp_path / "images").rglob("*.*"))


class Logging(JobStore):
    """The real store, whose submission is cancelled once the job is logged."""

    task: asyncio.Task[Any]

    async def submit(self, *arguments: Any, **options: Any) -> Any:
        job = await super().submit(*arguments, **options)
        self.task.cancel()
        await asyncio.sleep(0)
        return job


async def test_a_submission_that_is_cancelled_while_it_is_logged_leaves_no_job(stand: Any, tmp_path: Path) -> None:
    service = stand.app.state.service
    service._door.jobs = store = Logging(stand.jobs._settings, stand.metrics)
    store.task = asyncio.create_task(service.submit(NewImage(prompt="a", image=text(file()))))
    with pytest.raises(asyncio.CancelledError):
        await store.task
    assert await stand.jobs.queue_depth() == 0
    assert kept(tmp_path) == 0
    await store.close()


async def test_files_are_read_as_many_at_a_time_as_are_decoded(stand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs(stand.jobs, stand.results, LimitSettings())
    inside, most, go_on = 0, 0, threading.Event()
    lock, full = threading.Lock(), threading.Semaphore(0)

    def watched(*arguments: Any) -> bytes:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        full.release()
        assert go_on.wait(20)
        with lock:
            inside -= 1
        return file()

    monkeypatch.setattr("serve.inputs.written_file", watched)
    reading = [asyncio.create_task(inputs.read(NewImage(prompt="a", image="AAAA"), "")) for _ in range(6)]
    for _ in range(DECODINGS):
        assert await asyncio.to_thread(full.acquire, timeout=20)
    reading[0].cancel()  # its thread goes on, and counts
    for _ in range(20):
        await asyncio.sleep(0)
    go_on.set()
    found = await asyncio.gather(*reading, return_exceptions=True)
    assert [isinstance(each, asyncio.CancelledError) for each in found] == [True, *[False] * 5]
    assert most == DECODINGS


async def test_settled_work_ends_before_its_cancellation_is_raised() -> None:
    ended, go_on = [], asyncio.Event()

    async def work(fails: bool) -> int:
        await go_on.wait()
        ended.append(fails)
        if fails:
            raise JobNotFound("gone")
        return 7

    for fails in (False, True):
        go_on.clear()
        task = asyncio.create_task(settled(work(fails)))
        for _ in range(3):
            await asyncio.sleep(0)
            task.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert ended == [False, True]
    assert await settled(work(False)) == 7
    with pytest.raises(JobNotFound):
        await settled(work(True))


@pytest.mark.parametrize(("kind", "extension"), [("jpeg", "jpg"), ("webp", "webp")])
async def test_a_picture_has_the_type_of_its_file(stand: Any, kind: str, extension: str) -> None:
    job = await stand.create(num_inference_steps=2, output_format=kind)
    assert job["request"]["output_compression"] == 90
    await stand.finish(job["id"], data=file(kind.upper()), extension=extension)
    job = (await stand.client.get(f"/v1/jobs/{job['id']}")).json()
    answer = await stand.client.get(job["images"][0]["url"])
    assert answer.headers["content-type"] == job["images"][0]["content_type"] == f"image/{kind}"
    assert decoded(answer.content).format == kind.upper()
    again = await stand.create(image=f"{job['id']}/0", strength=0.5)
    assert (again["request"]["width"], again["request"]["height"]) == SIZE
