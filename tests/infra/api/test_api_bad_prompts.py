"""Prompts that can't be read: each is refused at once, with the field and the place, and nothing is encoded."""

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from serve.settings.orders import PromptSettings, TemplateSettings

pytestmark = pytest.mark.anyio
SOON_S = 0.05
ROUTES = ("/v1/jobs", "/v1/embeddings", "/v1/prompts/analyze")
PROMPTS = PromptSettings(templates={"portrait": TemplateSettings(text="a portrait of {subject}")})

BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "a template without its variable": ({"template": "portrait"}, "prompt", "subject"),
    "a variable that nobody reads": ({"prompt": "a", "variables": {"b": "c"}}, "variables.b", "{b}"),
    "a template that there is not": ({"template": "landscape"}, "template", "portrait"),
    "a weight of 1e9": ({"prompt": "a (red:1000000000) b"}, "prompt", "character"),
    "weights that multiply to too much": ({"prompt": "((red:900):900)"}, "prompt", "1000"),
    "a weight that is no number": ({"prompt": "a (red:1.2.3)"}, "prompt", "1.2.3"),
    "compel's weight of 1e9": ({"prompt": "(red)1000000000", "prompt_syntax": "compel"}, "prompt", "character"),
    "a piece of NaN": ({"prompt": [{"text": "a", "weight": float("nan")}]}, "prompt.0.weight", "finite"),
    "a piece of 1e9": ({"prompt": [{"text": "a", "weight": 1e9}, {"text": "b"}]}, "prompt.0.weight", "1000"),
    "weights that add up to nothing": (
        {"prompt": [{"text": "a", "weight": 1}, {"text": "b", "weight": -1}]}, "prompt", "nothing",
    ),
    "10,000 round brackets": ({"prompt": "(" * 4000 + "a" + ")" * 4000}, "prompt", "character"),
    "10,000 square brackets": ({"prompt": "[" * 4000 + "a" + "]" * 4000}, "prompt", "character"),
    "10,000 braces": ({"prompt": "{" * 4000 + "a|b" + "}" * 4000}, "prompt", "character"),
    "a switch past the last step": (
        {"prompt": "a [red:blue:60] b", "num_inference_steps": 50}, "prompt", "past the last step",
    ),
    "a schedule past the last step": (
        {"prompt": "a", "num_inference_steps": 50, "schedule": [{"from": 10, "to": 60, "prompt": "b"}]},
        "schedule.0.to", "50",
    ),
    "entries that overlap": (
        {"prompt": "a", "schedule": [{"from": 1, "to": 8, "prompt": "b"}, {"from": 5, "to": 9, "prompt": "c"}]},
        "schedule.1.from", "schedule.0",
    ),
    "a concept that no file defines": ({"prompt": "a <my-cat> on a mat"}, "prompt", "my-cat"),
    "a network that needs an adapter": ({"prompt": "a cat <lora:style:0.8>"}, "prompt", "lora"),
    "a control character": ({"prompt": "a\u0007b"}, "prompt", "control"),
    "a control character in a piece": ({"prompt": [{"text": "a\u0000"}]}, "prompt.0.text", "control"),
    "a control character in a variable": ({"prompt": "{a}", "variables": {"a": "\u001b"}}, "variables.a", "control"),
    "1 MB of commas": ({"prompt": "," * 1_000_000}, "prompt", "8192"),
    "1 MB of commas in a piece": ({"prompt": [{"text": "," * 1_000_000}]}, "prompt.0.text", "8192"),
    "a call of another tool": ({"prompt": 'a cat.swap("dog")', "prompt_syntax": "compel"}, "prompt", "swap"),
    "too long for the policy": ({"prompt": "a red circle, " * 40, "long_prompt": "error"}, "prompt", "75"),
    "an unknown rule": ({"prompt": "a", "prompt_weighting": "magic"}, "prompt_weighting", "compel"),
    "a prompt of nothing": ({"prompt": [{"text": " "}]}, "prompt", "empty"),
}  # fmt: skip


@pytest.fixture
async def texts(stand_on: Any, redis_url: str, tmp_path: Path) -> AsyncIterator[Any]:
    async with stand_on(redis_url, tmp_path, prompts=PROMPTS) as stand:
        yield stand


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", BAD)
async def test_a_bad_prompt_is_refused_at_once_by_its_place(texts: Any, name: str, route: str, refused: Any) -> None:
    order, param, place = BAD[name]
    body = json.dumps(order)
    took = []
    for _ in range(3):  # the machine has other things to do as well
        began = time.perf_counter()
        answer = await texts.client.post(route, content=body, headers={"content-type": "application/json"})
        took.append(time.perf_counter() - began)
    error = refused(answer, 422, param)
    assert place in error["message"]
    assert len(answer.content) < 1500
    assert await texts.jobs.queue_depth() == 0
    assert texts.metrics.value("tandem_encoder_forwards_total") == 0
    assert min(took) < SOON_S, f"{name}: {min(took) * 1000:.0f} ms"


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("half", ["\\ud800", "\\udfff", "a\\udc00b"])
async def test_a_lone_surrogate_is_refused(texts: Any, field: str, half: str, refused: Any) -> None:
    body = f'{{"prompt": "a", "{field}": "{half}"}}'.encode()
    for route in ROUTES:
        answer = await texts.client.post(route, content=body, headers={"content-type": "application/json"})
        error = refused(answer, 422, field)
        assert "character" in error["message"]


async def test_a_blend_that_does_not_add_up_to_1_is_taken_and_told(texts: Any) -> None:
    job = await texts.create(prompt=[{"text": "a", "weight": 2}, {"text": "b", "weight": 6}])
    (note,) = job["notes"]
    assert "0.25, 0.75" in note["message"]
