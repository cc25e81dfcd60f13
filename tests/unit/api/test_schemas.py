"""The order's types, as JSON that has gone through Python's parser, and the views of a job."""

import dataclasses
import json
import unicodedata
from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from serve.api.analysis_schemas import AnalysisOrder
from serve.api.job_schemas import webhook_body
from serve.api.model_schemas import ModelView
from serve.api.schemas import EventView, JobOrder, JobView, PreviewView
from serve.api.text_schemas import EmbeddingOrder
from serve.domain.jobs import ImageRef, Job, JobError, JobEvent, JobState
from serve.domain.orders import ImageRequest
from serve.domain.text import CacheReport, Truncation
from serve.offers import ModelInfo
from serve.orders import NewImage
from serve.text import NewText


def parse(body: str) -> JobOrder:
    return JobOrder.model_validate(json.loads(body))


def parse_text(body: str) -> EmbeddingOrder:
    return EmbeddingOrder.model_validate(json.loads(body))


def defaults(order: type[BaseModel], but: Collection[str] = ()) -> dict[str, Any]:
    return {name: field.default for name, field in order.model_fields.items() if name not in (*but, "prompt")}


def fields_of(new: Any, but: Collection[str]) -> dict[str, Any]:
    return {each.name: each.default for each in dataclasses.fields(new) if each.name not in (*but, "prompt")}


OF_PROMPTS = {
    "prompt": [{"text": "a\tb", "weight": 0.5}, {"text": "c", "weight": 1.0}],
    "schedule": [{"from": 1, "to": 0.5, "prompt": "d", "ramp": True}],
    "prompt_syntax": "compel",
    "prompt_weighting": "multiply",
    "long_prompt": "hierarchical",
    "variables": {"e": "f"},
    "template": "g",
    "arm": "h",
}


def test_an_order_has_the_fields_and_defaults_of_the_service() -> None:
    # The salt is no client's to choose: it comes from the header that an authenticating proxy sets.
    assert defaults(JobOrder) == fields_of(NewImage, but={"salt"})
    of_texts = defaults(EmbeddingOrder, but={"dtype", "output"}) | defaults(AnalysisOrder)
    assert of_texts == fields_of(NewText, but={"salt"})
    assert set(ModelView.model_fields) - {"object", "owned_by", "images", "concepts"} == {
        each.name for each in dataclasses.fields(ModelInfo)
    }


def test_a_full_order_is_taken_as_it_stands() -> None:
    order = {"prompt": "a\tb\n(c:1.2) 🐈", "negative_prompt": "d", "model": "shapes", "width": 64, "height": 64}
    order |= {"num_inference_steps": 20, "guidance_scale": 7, "seed": 2**40, "num_images": 2, "clip_skip": 1}
    order |= {"aspect_ratio": "16:9", "round_size": True, "true_cfg_scale": 2.5, "scheduler": "euler_a"}
    order |= {"use_t5": False, "step_cache": 0.1, "tiny_vae": True}
    order |= {"image": "data:image/png;base64,AAAA", "mask": f"{'0' * 32}/mask", "strength": 1, "preview_every": 5}
    order |= {"mask_blur": 2.5, "mask_invert": True, "resize_mode": "fill"}
    order |= {"padding_mask_crop": 32, "masked_content": "latent_noise"}
    order |= {"variation_seed": 2**40, "variation_strength": 0.5}
    order |= {"output_format": "webp", "output_compression": 80, "bit_depth": 8}
    order |= {"priority": "batch", "webhook": "https://example.com/told?of=this"}
    order |= OF_PROMPTS
    assert parse(json.dumps(order)).model_dump(by_alias=True) == order


def test_a_full_text_order_is_taken_as_it_stands() -> None:
    order = {"prompt": "a\tb\n(c:1.2) 🐈", "negative_prompt": "", "model": "shapes", "width": 64, "height": 2048}
    order |= {"clip_skip": 1, "use_t5": False, "max_sequence_length": 77, "dtype": "bfloat16", "output": "report"}
    order |= OF_PROMPTS | {"seed": 3, "num_inference_steps": 20, "step": 5}
    assert parse_text(json.dumps(order)).model_dump(by_alias=True) == order
    assert parse_text('{"prompt": "a"}').negative_prompt is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "1"),
        ("prompt", r'"a\u0000b"'),
        ("negative_prompt", "1"),
        ("negative_prompt", r'"\udfff"'),
        ("model", json.dumps("x" * 257)),
        ("width", "1.5"),
        ("height", "NaN"),
        ("clip_skip", "true"),
        ("clip_skip", '"1"'),
        ("use_t5", "1"),
        ("use_t5", "null"),
        ("max_sequence_length", "77.0"),
        ("dtype", '"int8"'),
        ("dtype", "null"),
        ("output", '"json"'),
        ("salt", '"0123456789abcdef"'),
        ("seed", "1.5"),
        ("step", "null"),
        ("guidance_scale", "7"),
    ],
)
def test_each_wrong_field_of_a_text_order_is_refused_by_name(field: str, value: str) -> None:
    prompt = "" if field == "prompt" else '"prompt": "a", '
    with pytest.raises(ValidationError) as caught:
        parse_text(f'{{{prompt}"{field}": {value}}}')
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "1"),
        ("prompt", '{"text": "a"}'),
        ("prompt", "[]"),
        ("prompt", r'"a\u0000b"'),
        ("prompt", r'"a\ud800b"'),
        ("prompt", r'"a\u001bb"'),
        ("prompt", r'"a\u007fb"'),
        ("prompt", r'"a\u009bb"'),
        ("negative_prompt", r'"\u0000"'),
        ("negative_prompt", r'"\udfff"'),
        ("negative_prompt", "true"),
        ("schedule", '"10-20"'),
        ("prompt_syntax", '"markdown"'),
        ("prompt_syntax", "1"),
        ("prompt_weighting", "null"),
        ("long_prompt", '"cut"'),
        ("variables", "[]"),
        ("template", "1"),
        ("arm", json.dumps("x" * 257)),
        ("model", "true"),
        ("model", r'"\u0007"'),
        ("model", json.dumps("x" * 257)),
        ("width", "true"),
        ("width", '"64"'),
        ("height", "64.0"),
        ("height", "[]"),
        ("num_inference_steps", "true"),
        ("num_inference_steps", "1e3"),
        ("guidance_scale", "NaN"),
        ("guidance_scale", "Infinity"),
        ("guidance_scale", "-Infinity"),
        ("guidance_scale", "1e999"),
        ("guidance_scale", "true"),
        ("guidance_scale", '"7"'),
        pytest.param("guidance_scale", "1" + "0" * 400, id="guidance_scale-huge"),
        ("seed", "false"),
        ("seed", "1.5"),
        ("num_images", "null"),
        ("num_images", "true"),
        ("aspect_ratio", "1.5"),
        ("aspect_ratio", r'"16:9\u0000"'),
        ("round_size", "1"),
        ("scheduler", json.dumps("x" * 257)),
        ("image", "[]"),
        ("image", '{"url": "x"}'),
        ("mask", "1"),
        ("strength", "NaN"),
        ("strength", '"0.5"'),
        ("true_cfg_scale", "Infinity"),
        ("preview_every", "1.5"),
        ("preview_every", "true"),
        ("step_cache", "null"),
        ("tiny_vae", "0"),
        ("priority", '"urgent"'),
        ("priority", "null"),
        ("priority", "1"),
        ("webhook", "1"),
        ("webhook", r'"https://a.example/\u0000"'),
        ("webhook", json.dumps("https://a.example/" + "x" * 2048)),
        ("steps", "20"),
        ("__class__", "{}"),
    ],
)
def test_each_wrong_type_is_refused_by_name(field: str, value: str) -> None:
    prompt = "" if field == "prompt" else '"prompt": "a", '
    with pytest.raises(ValidationError) as caught:
        parse(f'{{{prompt}"{field}": {value}}}')
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("prompt", '["a"]', (0,)),
        ("prompt", '[{"text": "a"}, {"weight": 1}]', (1, "text")),
        ("prompt", '[{"text": "a", "weight": NaN}]', (0, "weight")),
        ("prompt", '[{"text": "a", "weight": true}]', (0, "weight")),
        ("prompt", '[{"text": "a", "wieght": 1}]', (0, "wieght")),
        ("prompt", r'[{"text": "a\u0000"}]', (0, "text")),
        ("negative_prompt", '[{"text": 1}]', (0, "text")),
        ("schedule", '[{"to": 5, "prompt": "a"}]', (0, "from")),
        ("schedule", '[{"from": true, "prompt": "a"}]', (0, "from")),
        ("schedule", '[{"from": 1, "to": NaN, "prompt": "a"}]', (0, "to")),
        ("schedule", '[{"from": 1, "to": -1, "prompt": "a"}]', (0, "to")),
        ("schedule", '[{"from": 1, "to": 1e400, "prompt": "a"}]', (0, "to")),
        ("schedule", '[{"from": 1}]', (0, "prompt")),
        ("schedule", '[{"from": 1, "prompt": [{"text": 2}]}]', (0, "prompt", 0, "text")),
        ("schedule", '[{"from": 1, "prompt": "a", "ramp": 1}]', (0, "ramp")),
        ("variables", '{"a": 1}', ("a",)),
        ("variables", r'{"a": "\ud800"}', ("a",)),
    ],
)
def test_a_wrong_piece_is_refused_by_its_place(field: str, value: str, place: tuple[Any, ...]) -> None:
    prompt = "" if field == "prompt" else '"prompt": "a", '
    with pytest.raises(ValidationError) as caught:
        parse(f'{{{prompt}"{field}": {value}}}')
    assert [error["loc"] for error in caught.value.errors()] == [(field, *place)]


def test_a_step_and_a_share_stay_what_they_were_written_as() -> None:
    order = parse('{"prompt": "a", "schedule": [{"from": 1, "to": 1.0, "prompt": "b"}, {"from": 0.5, "prompt": "c"}]}')
    entries = order.model_dump(by_alias=True)["schedule"]
    assert [(entry["from"], type(entry["from"]), entry["to"]) for entry in entries] == [
        (1, int, 1.0),
        (0.5, float, None),
    ]
    assert type(entries[0]["to"]) is float


@given(st.text(st.characters()))
def test_any_text_is_taken_unchanged_or_refused(text: str) -> None:
    refused = any(unicodedata.category(each) in ("Cc", "Cs") and each not in "\t\n\r" for each in text)
    if refused:
        with pytest.raises(ValidationError, match="prompt"):
            JobOrder(prompt=text)
    else:
        assert JobOrder(prompt=text).prompt == text


def job(**changes: Any) -> Job:
    request = ImageRequest(
        model="m", prompt="p", width=64, height=64, num_inference_steps=20, guidance_scale=5.0, seed=1
    )
    known: dict[str, Any] = {"id": "0" * 32, "state": JobState.QUEUED, "request": request, "attempt": 0}
    return Job(**known | {"step": 0, "steps": 20, "created_at": 1.5} | changes)


def test_a_queued_job() -> None:
    view = json.loads(JobView.of(job(position=3), "").model_dump_json())
    assert view["state"] == "queued"
    assert view["position"] == 3
    assert view["images"] == view["truncated"] == []
    assert view["cache"] is view["error"] is view["started_at"] is None
    assert set(view["timings"].values()) == {None}


def test_a_finished_job_names_its_images_under_the_mount_and_hides_their_keys() -> None:
    image = ImageRef(index=0, key="secret/key", seed=1, width=64, height=64, content_type="image/png", bytes=10)
    cut = Truncation(field="prompt", encoder="clip-l", tokens=90, limit=75, text="the rest")
    finished = job(
        state=JobState.SUCCEEDED, images=(image,), cache=CacheReport(redis=2), truncated=(cut,), finished_at=2.0
    )
    text = JobView.of(finished, "/root").model_dump_json()
    view = json.loads(text)
    assert "secret" not in text
    assert view["images"][0]["url"] == f"/root/v1/images/{'0' * 32}/0"
    assert view["cache"] == {"memory": 0, "redis": 2, "encoded": 0}
    assert view["truncated"] == [dataclasses.asdict(cut)]


def test_the_request_of_a_job_is_an_order_that_repeats_it() -> None:
    salted = dataclasses.replace(job().request, clip_skip=1, salt="0123456789abcdef")
    view = json.loads(JobView.of(job(request=salted), "").model_dump_json())
    beside = {"aspect_ratio", "round_size", "mask_invert", "resize_mode", "priority", "webhook"}
    beside |= {"schedule", "variables"}
    again = parse(json.dumps(view["request"])).model_dump(exclude=beside)
    assert again | {"composed": 1, "salt": salted.salt} == dataclasses.asdict(salted)


def test_what_a_job_started_from_is_a_reference_in_its_request() -> None:
    mine = "0" * 32
    request = dataclasses.replace(
        job().request, image=f"{mine}/image-01234567.png", mask=f"{mine}/mask-01234567.png", strength=0.5
    )
    view = JobView.of(job(request=request, approximate=("step_cache",)), "")
    assert (view.request.image, view.request.mask) == (f"{mine}/image", f"{mine}/mask")
    assert view.approximate == ("step_cache",)


def test_a_failed_job_says_why() -> None:
    failed = job(state=JobState.FAILED, error=JobError(code="out_of_memory", message="too large"))
    assert json.loads(JobView.of(failed, "").model_dump_json())["error"] == {
        "code": "out_of_memory",
        "message": "too large",
    }


def test_an_event() -> None:
    event = JobEvent(id="1-0", state=JobState.RUNNING, step=3, steps=20, attempt=2)
    told = {"state": "running", "step": 3, "steps": 20, "attempt": 2}
    assert json.loads(EventView.of(event).model_dump_json()) == told


def test_a_preview_is_a_data_url() -> None:
    event = JobEvent(id="1-0", state=JobState.RUNNING, step=3, steps=20, index=1, preview=b"\xff\xd8")
    assert json.loads(PreviewView.of(event).model_dump_json()) == {
        "state": "running",
        "step": 3,
        "steps": 20,
        "index": 1,
        "image": "data:image/jpeg;base64,/9g=",
    }


def test_a_webhook_tells_the_job_as_the_api_does() -> None:
    image = ImageRef(index=0, key="k", seed=1, width=64, height=64, content_type="image/png", bytes=10)
    ended = job(
        state=JobState.SUCCEEDED, images=(image,), finished_at=1700000000.5, webhook="https://a.example/?token=x"
    )
    told = json.loads(webhook_body(ended, "https://images.example"))
    assert (told["type"], told["timestamp"]) == ("job.succeeded", "2023-11-14T22:13:20.500000Z")
    assert told["data"] == json.loads(JobView.of(ended, "https://images.example").model_dump_json())
    assert told["data"]["images"][0]["url"].startswith("https://images.example/v1/images/")
    assert "token=x" not in json.dumps(told)
