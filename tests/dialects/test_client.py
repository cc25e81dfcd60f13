"""The Python client on a server that draws: every method, and both ways."""

import asyncio
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load
from support.drawing import Drawing

from serve.callers import Scope
from serve.client import AsyncClient, Client, JobFailed, Order, Preview, Progress
from serve.domain.jobs import JobState
from serve.domain.text import Tier
from serve.errors import Forbidden, InvalidRequest, JobNotFound, ModelNotFound, QueueFull, Unauthorized

DrawingWith = Callable[..., AbstractContextManager[Drawing]]
NOBODYS = "0" * 32


@pytest.fixture
def client(drawing: Drawing) -> Iterator[Client]:
    with Client(drawing.url) as client:
        yield client


def test_pictures_previews_and_the_same_order_again(client: Client) -> None:
    seen: list[Progress] = []
    pictures = client.generate(
        "a red circle", seed=7, num_images=2, num_inference_steps=2, preview_every=1, on_progress=seen.append
    )
    assert [(each.info.index, each.seed) for each in pictures] == [(0, 7), (1, 8)]
    assert Image.open(io.BytesIO(pictures[0].data)).size == (128, 128)
    job = pictures[0].job
    assert (job.state, job.model, job.steps, job.request["num_images"]) == (JobState.SUCCEEDED, "shapes", 2, 2)
    assert job.cache is not None
    assert job.timings.total_s is not None
    previews = [each for each in seen if isinstance(each, Preview)]
    assert {each.index for each in previews} <= {0, 1}
    assert all(Image.open(io.BytesIO(each.data)).format == "JPEG" for each in previews)
    assert previews
    assert seen[-1].state is JobState.SUCCEEDED
    again = client.generate(**job.order)
    assert [each.data for each in again] == [each.data for each in pictures]


def test_a_picture_is_sent_as_a_path_as_bytes_as_pillow_s_or_by_name(client: Client, tmp_path: Path) -> None:
    (start,) = client.generate("a red circle", seed=1, num_inference_steps=2)
    start.save(tmp_path / "start.png")
    sources = [start, tmp_path / "start.png", start.data, Image.open(io.BytesIO(start.data))]
    order: Order = {"prompt": "a blue circle", "seed": 1, "num_inference_steps": 2, "strength": 0.5}
    drawn = [client.generate(**order, image=source)[0] for source in sources]
    assert len({each.data for each in drawn}) == 1
    assert client.image(drawn[0].job, "image") == client.image(drawn[1].job.id, "image")
    with pytest.raises(OSError, match="nothing"):
        client.submit("a blue circle", image=tmp_path / "nothing.png")


def test_a_job_is_submitted_followed_listed_and_cancelled(client: Client) -> None:
    job = client.submit("a red circle", num_inference_steps=150, num_images=4, idempotency_key="the-same")
    assert client.submit("a red circle", num_inference_steps=150, num_images=4, idempotency_key="the-same").id == job.id
    events = client.follow(job)
    assert next(each for each in events if each.step).steps == 150
    assert client.cancel(job).id == job.id
    *_, last = events
    assert last.state is JobState.CANCELLED
    assert client.wait(job.id).state is JobState.CANCELLED
    with pytest.raises(JobFailed, match="is cancelled"):
        client.pictures(job.id)
    listed = next(client.jobs(["cancelled"]))
    assert (listed.id, listed.request) == (job.id, job.request)
    assert len(list(client.jobs(most=1))) == 1


def test_what_the_server_says_of_itself_and_of_texts(client: Client) -> None:
    (model,) = client.models()
    assert (model.id, model.default_width, model.images) == ("shapes", 128, True)
    (placement,) = client.fleet()
    assert placement.model == "shapes"
    limits = client.limits()
    assert (limits.limits, limits.scopes) == ((), tuple(sorted(Scope)))
    quote = client.quote("a red circle", num_images=2)
    assert (quote.request["num_images"], quote.placements[0].name) == (2, placement.name)
    assert quote.cost_ms > 0
    found = client.analyze("a [red:(blue:1.3):0.5] circle", negative_prompt="a star", num_inference_steps=10)
    assert [each.first for each in found.schedule] == [0, 5]
    assert any(token.weight == 1.3 for each in found.readings for row in each.rows for token in row.tokens)
    (same,) = client.compare(["a red circle", "a red circle", "a star"])
    assert same.matrix[0][1] == pytest.approx(1)
    assert same.matrix[0][2] < 1
    tensors = load(client.embed("a red circle", negative_prompt="", dtype="float16"))
    assert set(tensors) == {"prompt_embeds", "negative_prompt_embeds"}
    encoded = client.encode("a red circle")
    assert encoded.tensors["prompt_embeds"] == tuple(tensors["prompt_embeds"].shape)
    assert encoded.cache.encoded == 0, "it was encoded just now"
    assert {unit.tier for unit in client.analyze("a red circle").units} == {Tier.MEMORY}
    pools = client.pools()
    assert pools is not None
    assert {pool.name: pool.ready for pool in pools} == {"text_encoder": True, "diffusion": True}


def test_refusals_are_errors_of_their_own(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="width") as refused:
        client.generate("a red circle", width=100)
    assert refused.value.param == "width"
    with pytest.raises(InvalidRequest, match="no such field"):
        client.submit("a red circle", **{"sed": 7})  # type: ignore[misc]
    with pytest.raises(ModelNotFound, match="nothing"):
        client.submit("a red circle", model="nothing")
    for ask in (client.get, client.wait, client.cancel, client.image, lambda job: next(client.follow(job))):
        with pytest.raises(JobNotFound):
            ask(NOBODYS)


def test_keys_and_a_full_queue(drawing_with: DrawingWith) -> None:
    with drawing_with(worker=False, jobs={"max_queued": 1}, keys={"required": True}) as server:
        with Client(server.url) as nobody, pytest.raises(Unauthorized):
            nobody.models()
        with Client(server.url, server.key(scopes=[Scope.EMBED])) as other, pytest.raises(Forbidden):
            other.submit("a red circle")
        with Client(server.url, server.key(), busy_s=0) as client:
            job = client.submit("a red circle")
            with pytest.raises(QueueFull) as full:
                client.submit("a red circle")
            assert (full.value.retry_after_s or 0) > 0
            assert client.get(job).position == 1
            assert [name.name for name in client.limits().limits] == []


def test_the_async_client_draws_several_at_once(drawing: Drawing) -> None:
    async def story() -> None:
        async with AsyncClient(drawing.url) as client:
            drawn = await asyncio.gather(
                *(client.generate("a red circle", seed=seed, num_inference_steps=2) for seed in (1, 2))
            )
            assert [each[0].seed for each in drawn] == [1, 2]
            job = drawn[0][0].job
            assert [event.state async for event in client.follow(job)][-1] is JobState.SUCCEEDED
            assert await client.image(job) == drawn[0][0].data
            assert job.id in [each.id async for each in client.jobs(["succeeded"], 50)]

    asyncio.run(story())
