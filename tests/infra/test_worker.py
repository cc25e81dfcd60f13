"""The life of a job in one worker, with a real Redis, the shipped model and a folder; only Ray is missing."""

import asyncio
import io
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pydantic import SecretStr
from support.house import House, open_house

from serve.domain.jobs import JobEvent, JobState
from serve.domain.text import EncodeUnit, Sign, Tier
from serve.encoders.cache import EmbeddingCache, Fetched
from serve.errors import BackendUnavailable
from serve.jobs.events import follow
from serve.orders import NewImage
from serve.placements import Fleet
from serve.results.encode import read_parameters
from serve.service import ImageService
from serve.settings.orders import LimitSettings
from serve.settings.stores import CacheSettings
from serve.shapes.draw import draw, sample_scene

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def house(redis_url: str, tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(redis_url, tmp_path) as house:
        yield house


async def test_a_job_becomes_images_with_their_parameters(house: House) -> None:
    async with house.worker():
        await house.submit("a", num_images=2)
        job = await house.ended("a")
    assert job.state is JobState.SUCCEEDED
    assert job.cache is not None
    assert job.cache.encoded == 2
    signs = [house.metrics.value("tandem_text_units_total", tier="encoded", sign=sign) for sign in Sign]
    assert signs == [1, 0, 1]  # the prompt; the empty negative prompt
    assert [image.seed for image in job.images] == [1, 2]
    data = (house.folder / "images" / job.images[1].key).read_bytes()
    assert read_parameters(data)["seed"] == 2
    assert job.timings.total_s is not None


async def test_a_job_goes_through_every_state_once(house: House) -> None:
    async with house.worker():
        await house.submit("a", num_inference_steps=20)
        events = await house.events("a")
    assert list(dict.fromkeys(event.state for event in events)) == [
        JobState.QUEUED,
        JobState.ENCODING,
        JobState.RUNNING,
        JobState.STORING,
        JobState.SUCCEEDED,
    ]
    assert [event.state for event in events] == sorted((event.state for event in events), key=list(JobState).index)
    steps = [event.step for event in events]
    assert steps == sorted(steps)
    assert (steps[-1], {event.step for event in events if event.state is JobState.ENCODING}) == (20, {0})
    assert {(event.attempt, event.fence) for event in events[1:]} == {(1, 1)}


async def test_a_drawn_job_leaves_a_line_in_the_log(house: House, caplog: pytest.LogCaptureFixture) -> None:
    await house.submit("logged", num_images=2)
    with caplog.at_level("INFO", "serve.attempt"):
        async with house.worker("a"):
            await house.ended("logged")
    (line,) = (record for record in caplog.records if record.message == "job drawn")
    told = vars(line)
    assert (told["job"], told["size"], told["steps"], told["images"]) == ("logged", "128x128", 3, 2)
    assert all(told[f"{stage}_ms"] >= 0 for stage in ("queued", "text", "steps", "decode", "put"))
    assert "a red circle" not in str(told)


def a_scene() -> Image.Image:
    """A picture of the kind that the shipped model draws."""
    return Image.fromarray(draw(sample_scene(np.random.default_rng(3))))


def a_mask(side: int = 128) -> Image.Image:
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).rectangle((0, 0, side // 2, side), fill=255)
    return mask


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def apart(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())


async def test_a_job_that_starts_from_an_image_stays_close_to_it(house: House) -> None:
    await house.results.put("near/image-00000000.png", png(a_scene()), "image/png")
    order = {
        "image": "near/image-00000000.png",
        "num_inference_steps": 10,
        "prompt": "a green square on a yellow background",
    }
    async with house.worker():
        await house.submit("near", strength=0.2, **order)
        await house.submit("far", strength=0.9, **order)
        near, far = [await house.ended(job_id) for job_id in ("near", "far")]
    assert (near.state, near.step, near.steps, far.steps) == (JobState.SUCCEEDED, 2, 2, 9)
    pictures = [await house.picture(job) for job in (near, far)]
    distances = [apart(picture, a_scene()) for picture in pictures]
    assert distances[0] < 12 < 20 < distances[1]


async def test_a_masked_job_repaints_what_is_white(house: House) -> None:
    keys = {field: f"a/{field}-00000000.png" for field in ("image", "mask")}
    await house.results.put(keys["image"], png(a_scene()), "image/png")
    await house.results.put(keys["mask"], png(a_mask()), "image/png")
    async with house.worker():
        await house.submit("a", **keys, strength=1.0, prompt="a green square on a yellow background")
        job = await house.ended("a")
    picture = await house.picture(job)
    kept, painted = (80, 0, 128, 128), (0, 0, 48, 128)
    assert apart(picture.crop(kept), a_scene().crop(kept)) < 7
    assert apart(picture.crop(painted), a_scene().crop(painted)) > 14


async def test_of_a_masked_job_with_a_blur_the_rest_is_stored_to_the_bit(house: House) -> None:
    keys = {field: f"a/{field}-00000000.png" for field in ("image", "mask")}
    await house.results.put(keys["image"], png(a_scene()), "image/png")
    await house.results.put(keys["mask"], png(a_mask()), "image/png")
    async with house.worker():
        await house.submit("a", **keys, strength=1.0, prompt="a green square on a yellow background", mask_blur=2.0)
        job = await house.ended("a")
    picture, kept, painted = await house.picture(job), (72, 0, 128, 128), (0, 0, 48, 128)
    assert picture.crop(kept).tobytes() == a_scene().crop(kept).tobytes()
    assert apart(picture.crop(painted), a_scene().crop(painted)) > 14
    assert read_parameters(await house.results.get(job.images[0].key))["mask_blur"] == 2.0


async def test_variations_are_told_by_their_own_seeds(house: House) -> None:
    async with house.worker():
        await house.submit("a", seed=7, variation_seed=3, variation_strength=0.02, num_images=2)
        job = await house.ended("a")
    assert [image.seed for image in job.images] == [7, 7]
    told = [read_parameters(await house.results.get(image.key)) for image in job.images]
    assert [(each["seed"], each["variation_seed"]) for each in told] == [(7, 3), (7, 4)]
    assert apart(await house.picture(job, 0), await house.picture(job, 1)) > 0


async def test_an_image_is_stored_in_the_form_that_was_ordered(house: House) -> None:
    async with house.worker():
        await house.submit("a", output_format="jpeg", output_compression=80, num_images=2)
        await house.submit("b", bit_depth=16)
        job, deep = [await house.ended(job_id) for job_id in ("a", "b")]
    assert [(image.key, image.content_type) for image in job.images] == [
        ("a/0.jpg", "image/jpeg"),
        ("a/1.jpg", "image/jpeg"),
    ]
    for image in job.images:
        data = await house.results.get(image.key)
        with Image.open(io.BytesIO(data)) as picture:
            assert (picture.format, picture.size) == ("JPEG", (image.width, image.height))
        assert image.bytes == len(data)
    (image,) = deep.images
    assert (image.key, image.content_type, image.width, image.height) == ("b/0.png", "image/png", 128, 128)
    assert (await house.results.get(image.key))[24] == 16  # bits of a sample, as the file's header has it


async def test_previews_come_with_the_events(house: House) -> None:
    async def seen() -> list[JobEvent]:
        return [event async for event in follow(house.jobs, "a") if event.preview is not None]

    await house.submit("a", num_inference_steps=60, num_images=2, preview_every=2)
    following = asyncio.create_task(seen())
    async with house.worker():
        shown = await following
        job = await house.jobs.get("a")
    assert job.state is JobState.SUCCEEDED
    assert {event.index for event in shown} == {0, 1}
    assert {event.state for event in shown} <= {JobState.RUNNING, JobState.STORING}
    steps = [event.step for event in shown if event.index == 0]
    assert steps == sorted(set(steps))
    assert all(step % 2 == 0 for step in steps)
    with Image.open(io.BytesIO(shown[-1].preview or b"")) as picture:
        assert (picture.format, picture.width >= 16) == ("JPEG", True)


async def test_an_approximate_image_is_labelled(house: House) -> None:
    async with house.worker():
        await house.submit("a", num_inference_steps=20, step_cache=1.0)
        await house.submit("b")
        labelled, exact = [await house.ended(job_id) for job_id in ("a", "b")]
    assert (labelled.approximate, exact.approximate) == (("step_cache",), ())
    found = [read_parameters(await house.results.get(job.images[0].key)) for job in (labelled, exact)]
    assert [each.get("approximate") for each in found] == [["step_cache"], None]


async def test_text_that_another_version_had_encoded_ahead_is_not_counted(house: House) -> None:
    """During a rollout, the ingress may have an encoder whose units are not this replica's."""
    await house.submit("a")
    await house.jobs.note_ahead("a", {"a unit of another encoder": Tier.REDIS})
    async with house.worker():
        job = await house.ended("a")
    assert job.state is JobState.SUCCEEDED
    assert [house.metrics.value("tandem_text_units_total", tier=tier) for tier in ("encoded", "redis")] == [2, 0]


async def test_a_cancelled_job_s_text_is_not_encoded_ahead(house: House) -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def prepare(units: Sequence[EncodeUnit]) -> Sequence[Tier]:
        asked.set()
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            left.set()

    service = ImageService(
        models={house.model.name: house.model},
        fleet=Fleet((house.placement,)),
        limits=LimitSettings(),
        jobs=house.jobs,
        planners={house.model.name: house.planner},
        prepare=prepare,
        results=house.results,
        pools={},
        metrics=house.metrics,
    )
    job = (await service.submit(NewImage(prompt="a red circle"))).job
    await asked.wait()
    assert (await service.cancel(job.id)).state is JobState.CANCELLED
    async with asyncio.timeout(10):
        await left.wait()
    await service.close()


async def test_a_text_that_was_encoded_lately_is_not_encoded_ahead_again(house: House, redis_url: str) -> None:
    asked: list[list[str]] = []
    cache = CacheSettings(redis_url=SecretStr(redis_url))

    async def nobody(units: Sequence[EncodeUnit]) -> Sequence[Fetched]:
        raise BackendUnavailable("nobody encodes here")

    async def prepare(units: Sequence[EncodeUnit]) -> Sequence[Tier]:
        asked.append([unit.key for unit in units])
        if len(asked) == 1:
            raise BackendUnavailable("the text encoder does not answer")
        return [Tier.ENCODED] * len(units)

    service = ImageService(
        models={house.model.name: house.model},
        fleet=Fleet((house.placement,)),
        limits=LimitSettings(),
        jobs=house.jobs,
        planners={house.model.name: house.planner},
        prepare=prepare,
        results=house.results,
        pools={},
        metrics=house.metrics,
        embeddings=(embeddings := EmbeddingCache(cache, nobody, house.metrics, place="ingress")),
    )

    async def submitted(prompt: str) -> str:
        job = (await service.submit(NewImage(prompt=prompt))).job
        async with asyncio.timeout(10):
            while service._ahead._tasks:  # noqa: ASYNC110
                await asyncio.sleep(0)
        return job.id

    await submitted("a red circle")  # which failed, and counts for nothing
    first = await submitted("a red circle")
    again = await submitted("a red circle")
    other = await submitted("a blue circle")
    assert [len(units) for units in asked] == [2, 2, 1]  # the empty negative prompt is known
    reports = [(await house.jobs.get(job)).cache for job in (first, again, other)]
    assert [report and report.encoded for report in reports] == [2, None, 1]
    embeddings.clear()  # as every process does that hears of an operator's `tandem cache clear`
    await submitted("a red circle")
    assert len(asked[3]) == 2
    embeddings.hear_redis_away()  # what one process has, another does not find
    await submitted("a red circle")
    assert len(asked[4]) == 2
    await service.close()
    await embeddings.close()


async def test_many_jobs_all_end_well(house: House) -> None:
    async with house.worker("one"):
        for number in range(12):
            await house.submit(str(number), num_inference_steps=2 + number % 5, seed=number)
        jobs = await asyncio.gather(*(house.ended(str(number)) for number in range(12)))
    assert {job.state for job in jobs} == {JobState.SUCCEEDED}
    assert house.metrics.value("tandem_jobs_total", state="succeeded") == 12
