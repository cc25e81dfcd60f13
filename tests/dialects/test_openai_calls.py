"""A server that draws nothing by itself: what OpenAI's own client raises, how often it asks, what its streams tell."""

import base64
import contextlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from support.drawing import Drawing
from support.jobs import ANY
from support.openai_clients import client_of, pixels
from support.server import wait_until

from serve.callers import Allowance, Scope
from serve.domain.jobs import JobError, Preview
from serve.jobs.store import Claim

WORDS = "a red circle"
WAIT_S = 1.5


@pytest.fixture(scope="module")
def guarded(drawing_with: Any) -> Iterator[Drawing]:
    """It wants a key, queues one job and draws none."""
    with drawing_with(keys={"required": True}, jobs={"max_queued": 1}, http={"wait_s": WAIT_S}, worker=False) as server:
        yield server


@pytest.fixture
def key(guarded: Drawing) -> str:
    return guarded.key()


def jobs(server: Drawing, key: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{server.url}/v1/jobs", headers={"x-api-key": key}).json()["data"]
    return found


@contextlib.contextmanager
def queued(server: Drawing, key: str) -> Iterator[None]:
    """With one job in the queue."""
    mine = {"x-api-key": key}
    job = httpx.post(f"{server.url}/v1/jobs", json={"prompt": WORDS}, headers=mine).json()
    try:
        yield
    finally:
        httpx.delete(f"{server.url}/v1/jobs/{job['id']}", headers=mine)


def requests(error: openai.APIStatusError) -> int:
    """How often the client asked before it gave up."""
    return int(error.request.headers["x-stainless-retry-count"]) + 1


def refused(server: Drawing, key: str, kind: type[openai.APIStatusError], **order: Any) -> openai.APIStatusError:
    with pytest.raises(kind) as failed:
        client_of(server, key).images.generate(**{"prompt": WORDS} | order)
    assert type(failed.value) is kind
    assert failed.value.request_id
    assert requests(failed.value) == 1
    return failed.value


def test_who_has_no_key_is_not_known(guarded: Drawing) -> None:
    assert refused(guarded, "sk-nobody", openai.AuthenticationError).code == "unauthorized"


def test_a_key_for_text_draws_nothing(guarded: Drawing) -> None:
    error = refused(guarded, guarded.key(scopes={Scope.EMBED}), openai.PermissionDeniedError)
    assert error.code == "forbidden"


def test_a_model_that_there_is_not_is_not_found(guarded: Drawing, key: str) -> None:
    error = refused(guarded, key, openai.NotFoundError, model="gpt-image-2")
    assert (error.code, error.param) == ("model_not_found", "model")
    for name in ("gpt-image-2", "a/b"):
        with pytest.raises(openai.NotFoundError) as failed:
            client_of(guarded, key).models.retrieve(name)
        assert failed.value.code == "model_not_found"


def test_a_body_that_is_not_json_is_a_bad_request(guarded: Drawing, key: str) -> None:
    with pytest.raises(openai.BadRequestError) as failed:
        client_of(guarded, key).post(
            "/images/generations",
            cast_to=object,
            content=b"{",
            options={"headers": {"Content-Type": "application/json"}},
        )
    assert failed.value.code == "invalid_json"


@pytest.mark.parametrize(
    ("order", "named", "told"),
    [
        ({"size": "100x100"}, "size", "size 100 is not a multiple of 8"),
        ({"size": "64"}, "size", "size must be"),
        ({"n": 0}, "n", "n must be between 1"),
        ({"quality": "best"}, "quality", "quality:"),
        ({"background": "transparent"}, "background", "background:"),
        ({"output_format": "gif"}, "output_format", "output_format:"),
        ({"output_compression": 50}, "output_compression", "output_compression is for"),
        ({"response_format": "svg"}, "response_format", "response_format:"),
        ({"prompt": ""}, "prompt", "prompt is empty"),
        ({"extra_body": {"scheduler": "best"}}, "scheduler", "scheduler: shapes has"),
        ({"extra_body": {"seed": -1}}, "seed", "seed must be"),
        ({"extra_body": {"width": 100}}, "width", "width 100"),
        ({"extra_body": {"mask": "data:image/png;base64,"}}, "mask", "mask"),
    ],
)
def test_a_wrong_field_is_named(guarded: Drawing, key: str, order: dict[str, Any], named: str, told: str) -> None:
    error = refused(guarded, key, openai.UnprocessableEntityError, **order)
    assert (error.param, error.code, error.type) == (named, "invalid_value", "invalid_request_error")
    assert told in error.message
    assert not jobs(guarded, key)


def test_a_used_up_allowance_is_told_with_when_to_come_back(guarded: Drawing) -> None:
    key = guarded.key(allowance=Allowance(max_unfinished=1))
    with queued(guarded, key), pytest.raises(openai.RateLimitError) as failed:
        client_of(guarded, key, max_retries=0).images.generate(prompt=WORDS)
    assert failed.value.code == "rate_limited"
    assert int(failed.value.response.headers["retry-after"]) >= 1


def test_a_full_queue_is_asked_once(guarded: Drawing, key: str) -> None:
    with queued(guarded, key):
        error = refused(guarded, key, openai.InternalServerError)
        assert (error.status_code, error.code) == (503, "queue_full")
        assert error.response.headers["x-should-retry"] == "false"
        assert int(error.response.headers["retry-after"]) >= 1
        assert len(jobs(guarded, key)) == 1
        with pytest.raises(openai.InternalServerError) as failed:  # before anything looks at the picture
            client_of(guarded, key).images.edit(image=b"no picture", prompt=WORDS)
        assert (failed.value.code, requests(failed.value)) == ("queue_full", 1)


def test_what_takes_too_long_goes_on_as_a_job(guarded: Drawing, key: str) -> None:
    error = refused(guarded, key, openai.InternalServerError)
    assert (error.status_code, error.code) == (504, "still_running")
    place = guarded.url + error.response.headers["location"]
    assert httpx.get(place, headers={"x-api-key": key}).json()["state"] == "queued"
    httpx.delete(place, headers={"x-api-key": key})


@pytest.mark.parametrize(
    ("fails", "kind", "status"), [(True, openai.InternalServerError, 500), (False, openai.ConflictError, 409)]
)
def test_a_job_without_pictures_is_not_ordered_again(
    guarded: Drawing, key: str, fails: bool, kind: type[openai.APIStatusError], status: int
) -> None:
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(refused, guarded, key, kind)
        wait_until(lambda: jobs(guarded, key), 10, "the job")
        if fails:
            claim = guarded.run(guarded.jobs.claim("worker", ANY))
            assert isinstance(claim, Claim)
            guarded.run(guarded.jobs.fail(claim, JobError(code="out_of_memory", message="too large"), retry=False))
        else:
            httpx.delete(f"{guarded.url}/v1/jobs/{jobs(guarded, key)[0]['id']}", headers={"x-api-key": key})
        error = call.result()
    assert (error.status_code, error.code) == (status, "out_of_memory" if fails else "cancelled")
    assert error.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_takes_its_job_along(guarded: Drawing, key: str, stream: bool) -> None:
    client = client_of(guarded, key, max_retries=0)
    if stream:
        client.images.generate(prompt=WORDS, stream=True).close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=WAIT_S / 4).images.generate(prompt=WORDS)
    wait_until(lambda: [each["state"] for each in jobs(guarded, key)] == ["cancelled"], 10, "the job to be cancelled")


def test_a_stream_ends_with_the_error_of_its_job(guarded: Drawing, key: str) -> None:
    opened = client_of(guarded, key).images.with_raw_response.generate(prompt=WORDS, stream=True)
    assert opened.headers["content-type"].startswith("text/event-stream")
    httpx.delete(guarded.url + opened.headers["location"], headers={"x-api-key": key})
    with pytest.raises(openai.APIError, match="was cancelled") as failed:
        list(opened.parse())
    assert failed.value.code == "cancelled"


def test_partial_pictures_come_evenly_and_no_more_than_were_asked_for(guarded: Drawing, key: str) -> None:
    stream = client_of(guarded, key).images.generate(
        prompt=WORDS, n=2, stream=True, partial_images=3, quality="low", output_format="webp", size="64x32"
    )
    claim = guarded.run(guarded.jobs.claim("worker", ANY))
    assert isinstance(claim, Claim)
    assert (claim.request.num_inference_steps, claim.request.preview_every) == (10, 2)
    told: list[Any] = []
    for step in (2, 4, 6, 8):  # due are those at 2.5, 5 and 7.5 or after
        grey = io.BytesIO()
        Image.new("L", (8, 4), 20 * step).save(grey, "JPEG")
        previews = [Preview(claim.job_id, index, step, 10, grey.getvalue()) for index in (0, 1)]
        guarded.run(guarded.jobs.renew(claim, step))
        guarded.run(guarded.jobs.preview(claim, *previews))
        if step > 2:
            told += [next(stream), next(stream)]
    httpx.delete(f"{guarded.url}/v1/jobs/{claim.job_id}", headers={"x-api-key": key})
    guarded.run(guarded.jobs.cancelled(claim))
    with pytest.raises(openai.APIError, match="was cancelled"):
        next(stream)
    assert {each.type for each in told} == {"image_generation.partial_image"}
    assert [(each.partial_image_index, each.index) for each in told] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert {(each.size, each.output_format, each.quality) for each in told} == {("64x32", "webp", "low")}
    assert [round(float(pixels(each.b64_json).mean()), -1) for each in told] == [80, 80, 120, 120, 160, 160]
    assert Image.open(io.BytesIO(base64.b64decode(told[0].b64_json))).size == (64, 32)
