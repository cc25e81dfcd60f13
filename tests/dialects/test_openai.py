"""OpenAI's Images API as OpenAI's own client speaks it: pictures of a prompt, and what is said of them."""

import io
from typing import Any

import httpx
import numpy as np
import pytest
from openai import OpenAI
from PIL import Image
from support.drawing import Drawing
from support.openai_clients import client_of, file_of, pixels, the_one

from serve.shapes.captions import held_out_prompts
from serve.shapes.judge import agrees, read

FAST = {"seed": 3, "num_inference_steps": 2}
WORDS = "a red circle on a blue background"


@pytest.fixture(scope="module")
def client(drawing: Drawing) -> OpenAI:
    return client_of(drawing, max_retries=0)


def order_of(server: Drawing, job_id: str) -> dict[str, Any]:
    request: dict[str, Any] = httpx.get(f"{server.url}/v1/jobs/{job_id}").json()["request"]
    return request


def test_pictures_are_what_was_asked_for(client: OpenAI) -> None:
    right = 0
    for prompt, scene in held_out_prompts(2):
        answer = client.images.generate(prompt=prompt, size="128x128", extra_body={"seed": 3})
        right += agrees(read(pixels(file_of(answer))), scene).ok
    assert right == 2


def test_an_answer_says_what_openais_does_and_more(client: OpenAI, drawing: Drawing) -> None:
    answer: Any = client.images.generate(prompt=WORDS, n=2, size="128x64", extra_body=FAST)
    assert [pixels(each.b64_json).shape for each in answer.data] == [(64, 128, 3)] * 2
    assert not (pixels(answer.data[0].b64_json) == pixels(answer.data[1].b64_json)).all()
    assert [each.seed for each in answer.data] == [3, 4]
    assert (answer.size, answer.output_format, answer.background, answer.quality) == (
        "128x64",
        "png",
        "opaque",
        "medium",
    )
    job = httpx.get(f"{drawing.url}/v1/jobs/{answer.job}").json()
    assert answer.created == int(job["finished_at"])
    assert answer.timings["total_s"] == job["timings"]["total_s"]
    assert answer._request_id


def test_tokens_are_counted(client: OpenAI) -> None:
    extra = {**FAST, "negative_prompt": "a green star"}
    usage = client.images.generate(prompt=WORDS, n=2, size="64x128", extra_body=extra).usage
    assert usage is not None
    assert usage.output_tokens_details is not None
    assert usage.input_tokens_details.text_tokens == usage.input_tokens == 7 + 3  # a word is a token of its encoder
    assert usage.output_tokens == usage.output_tokens_details.image_tokens == 2 * 4 * 8  # squares of 16 x 16
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_a_url_leads_to_the_picture(client: OpenAI, drawing: Drawing) -> None:
    order: Any = {"prompt": WORDS, "size": "64x64", "extra_body": FAST}
    place = the_one(client.images.generate(response_format="url", **order))
    file = the_one(client.images.generate(**order))
    assert (place.b64_json, file.url) == (None, None)
    assert str(place.url).startswith(f"{drawing.url}/v1/images/")
    assert (pixels(httpx.get(str(place.url)).content) == pixels(file.b64_json)).all()


@pytest.mark.parametrize(("kind", "compression"), [("jpeg", 30), ("webp", None)])
def test_files_are_of_the_format_that_was_asked_for(client: OpenAI, kind: Any, compression: int | None) -> None:
    answer = client.images.generate(
        prompt=WORDS, size="64x64", output_format=kind, output_compression=compression, extra_body=FAST
    )
    assert answer.output_format == kind
    assert Image.open(io.BytesIO(file_of(answer))).format == kind.upper()


def test_quality_is_steps(client: OpenAI, drawing: Drawing) -> None:
    answer: Any = client.images.generate(prompt=WORDS, quality="low", size="64x64")
    assert answer.quality == "low"
    assert order_of(drawing, answer.job)["num_inference_steps"] == 10


def test_native_fields_come_as_extra_body(client: OpenAI, drawing: Drawing) -> None:
    extra = {
        "negative_prompt": "green",
        "seed": 9,
        "num_inference_steps": 4,
        "guidance_scale": 2.5,
        "scheduler": "euler_a",
        "variables": {"color": "red"},
    }
    answer: Any = client.images.generate(prompt="a {color} circle", quality="high", extra_body=extra)
    order = order_of(drawing, answer.job)
    assert {name: order[name] for name in extra if name != "variables"} == {
        name: value for name, value in extra.items() if name != "variables"
    }
    assert order["prompt"] == answer.data[0].revised_prompt == "a red circle"


def test_what_is_unknown_is_ignored_and_null_is_nothing(client: OpenAI, drawing: Drawing) -> None:
    extra = {**FAST, "frobnicate": [1], "priority": None, "use_t5": None, "n": None, "size": None}
    answer: Any = client.images.generate(
        prompt=WORDS, moderation="low", style="vivid", user="someone", extra_body=extra, extra_query={"page": "1"}
    )
    order = order_of(drawing, answer.job)
    assert (order["width"], order["num_images"], order["use_t5"]) == (128, 1, True)


def test_the_same_order_is_the_native_ones_picture(client: OpenAI, drawing: Drawing) -> None:
    answer = client.images.generate(prompt=WORDS, size="64x64", extra_body=FAST)
    job = httpx.post(
        f"{drawing.url}/v1/jobs?wait=true", json={"prompt": WORDS, "width": 64, "height": 64, **FAST}, timeout=60
    ).json()
    native = httpx.get(drawing.url + job["images"][0]["url"]).content
    assert np.abs(pixels(file_of(answer)).astype(int) - pixels(native)).max() <= 1


def test_models_are_listed(client: OpenAI) -> None:
    models: list[Any] = client.models.list().data
    assert [(each.id, each.object, each.owned_by) for each in models] == [("shapes", "model", "tandem")]
    assert models[0].created > 1_500_000_000
    assert models[0].quality_steps == {"low": 10, "medium": 20, "high": 30, "xhigh": 40, "max": 60}
    assert client.models.retrieve("shapes") == models[0]
