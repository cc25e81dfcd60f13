"""Bad input is refused by name, and queues nothing."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("order", "status", "param"),
    [
        ({}, 422, "prompt"),
        ({"prompt": ""}, 422, "prompt"),
        ({"prompt": " \n\t"}, 422, "prompt"),
        ({"prompt": "x" * 8193}, 422, "prompt"),
        ({"prompt": "a\x00b"}, 422, "prompt"),
        ({"prompt": "a <lora:b:1>"}, 422, "prompt"),
        ({"negative_prompt": "x" * 8193}, 422, "negative_prompt"),
        ({"num_inference_steps": 0}, 422, "num_inference_steps"),
        ({"num_inference_steps": 1000}, 422, "num_inference_steps"),
        ({"guidance_scale": -1}, 422, "guidance_scale"),
        ({"guidance_scale": 10**400}, 422, "guidance_scale"),
        ({"width": 63}, 422, "width"),
        ({"height": 65}, 422, "height"),
        ({"height": 10**9}, 422, "height"),
        ({"num_images": 0}, 422, "num_images"),
        ({"num_images": True}, 422, "num_images"),
        ({"seed": -1}, 422, "seed"),
        ({"seed": 10**400}, 422, "seed"),
        ({"model": "other"}, 404, "model"),
        ({"model": "\u2028\n" + "x" * 255}, 422, "model"),
        ({"steps": 20}, 422, "steps"),
        ({"aspect_ratio": "7:3"}, 422, "aspect_ratio"),
        ({"aspect_ratio": "1:1", "width": 64}, 422, "aspect_ratio"),
        ({"scheduler": "flow_euler"}, 422, "scheduler"),
        ({"true_cfg_scale": 2}, 422, "true_cfg_scale"),
        ({"use_t5": False}, 422, "use_t5"),
        ({"clip_skip": 99}, 422, "clip_skip"),
        ({"preview_every": -1}, 422, "preview_every"),
        ({"preview_every": 21, "num_inference_steps": 20}, 422, "preview_every"),
        ({"step_cache": 1.5}, 422, "step_cache"),
        ({"tiny_vae": True}, 422, "tiny_vae"),
        ({"strength": 0.5}, 422, "strength"),
        ({"image": ""}, 422, "image"),
        ({"image": "http://127.0.0.1/a.png"}, 422, "image"),
        ({"image": "0" * 32 + "/0"}, 404, "image"),
        ({"mask": "iVBORw0KGgo="}, 422, "mask"),
    ],
)
async def test_a_bad_order_names_its_field_and_queues_nothing(
    stand: Any, order: dict[str, Any], status: int, param: str, refused: Any
) -> None:
    whole = order if order == {} or "prompt" in order else {"prompt": "a red circle"} | order
    error = refused(await stand.client.post("/v1/jobs", json=whole), status, param)
    assert param in error["message"]
    assert await stand.jobs.queue_depth() == 0


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"", 422, "body"),
        (b"{", 400, "body"),
        (b"\xff", 400, "body"),
        (b"[" * 100_000, 400, "body"),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", 400, "body"),
        (b"null", 422, "body"),
        (b"[]", 422, "body"),
        (b'"prompt"', 422, "body"),
        (b'{"prompt": "a", "guidance_scale": NaN}', 422, "guidance_scale"),
        (b'{"prompt": "a", "guidance_scale": 1e999}', 422, "guidance_scale"),
        (b'{"prompt": "a\\ud800"}', 422, "prompt"),
        (b'{"prompt": "a", "\\ud800": 1}', 422, "body"),
        (b'{"prompt": "a", "\\u001b\\u2028": 1}', 422, "\\x1b\\u2028"),
        (b'{"prompt": "a", "' + b"x" * 10_000 + b'": 1}', 422, "x" * 100),
        pytest.param(b'{"prompt": "' + b"x" * (32 << 20) + b'"}', 413, "body", id="over 32 MiB"),
    ],
)
async def test_a_bad_body_is_refused(stand: Any, body: bytes, status: int, param: str, refused: Any) -> None:
    answer = await stand.client.post("/v1/jobs", content=body, headers={"content-type": "application/json"})
    refused(answer, status, param)
    assert len(answer.content) < 1000
    assert await stand.jobs.queue_depth() == 0


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "nonsense"])
async def test_a_body_of_another_type_is_refused(stand: Any, content_type: str, refused: Any) -> None:
    answer = await stand.client.post("/v1/jobs", content=b'{"prompt": "a"}', headers={"content-type": content_type})
    refused(answer, 415, "body")


NEW = ["aspect_ratio", "image", "mask", "model", "preview_every", "scheduler", "step_cache", "strength", "round_size"]
KEYS = st.sampled_from(["prompt", "negative_prompt", "width", "height", "num_inference_steps", "seed", *NEW])
NUMBERS = st.integers() | st.floats() | st.integers(10**18, 10**320) | st.sampled_from([64, 20, 1])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ORDERS = st.dictionaries(
    KEYS | st.sampled_from(["guidance_scale", "num_images"]) | st.text(st.characters(), max_size=8), VALUES, max_size=5
)


def test_no_json_breaks_the_server_and_every_refusal_names_a_field(
    redis_url: str, tmp_path: Path, stand_on: Any, refused: Any
) -> None:
    context = stand_on(redis_url, tmp_path, max_queued=10_000)
    with asyncio.Runner() as runner:
        stand = runner.run(context.__aenter__())

        async def check(body: Any) -> None:
            before = await stand.jobs.queue_depth()
            answer = await stand.client.post(
                "/v1/jobs", content=json.dumps(body), headers={"content-type": "application/json"}
            )
            if answer.status_code != 202:
                assert answer.status_code in (404, 422), answer.text
                error = refused(answer, answer.status_code, answer.json()["error"]["param"])
                assert isinstance(error["param"], str)
                assert error["message"].isprintable()
            assert await stand.jobs.queue_depth() == before + (answer.status_code == 202)

        @settings(max_examples=200, deadline=None)
        @given(body=VALUES | ORDERS | ORDERS.map(lambda order: order | {"prompt": "a (red:1.2) circle"}))
        def each(body: Any) -> None:
            runner.run(check(body))

        each()
        runner.run(context.__aexit__(None, None, None))
