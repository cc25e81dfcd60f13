"""What may be asked about prompts, and what orders say of theirs: templates and arms, pieces, notes, the same again."""

import asyncio
import dataclasses
import os
import re
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from support.listening import listening
from support.text_models import flux_folder, sd3_folder, sdxl_folder

from serve.callers import Scope
from serve.domain.text import Weighting
from serve.prompts.parse import parse
from serve.settings.front import KeySettings
from serve.settings.orders import ArmSettings, PromptSettings, TemplateSettings
from serve.settings.pools import ModelSettings
from serve.settings.stores import CacheSettings

pytestmark = pytest.mark.anyio
FORWARDS = "tandem_encoder_forwards_total"
PROMPTS = PromptSettings(
    templates={
        "portrait": TemplateSettings(text="a {red|blue} {subject}", negative_prompt="a star"),
        "test": TemplateSettings(
            arms={"plain": ArmSettings(text="{prompt}"), "rich": ArmSettings(text="a large {prompt}")}
        ),
    }
)


@pytest.fixture
async def texts(stand_on: Any, redis_url: str, tmp_path: Path) -> AsyncIterator[Any]:
    cache = CacheSettings(redis_url=SecretStr(redis_url))
    async with stand_on(redis_url, tmp_path, cache=cache, prompts=PROMPTS) as stand:
        yield stand


async def analyzed(stand: Any, prompt: Any = "a red circle", **order: Any) -> dict[str, Any]:
    answer = await stand.client.post("/v1/prompts/analyze", json={"prompt": prompt} | order)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def embedded(stand: Any, **order: Any) -> dict[str, Any]:
    answer = await stand.client.post("/v1/embeddings", json={"output": "report"} | order)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def counted(stand: Any) -> set[Any]:
    samples = [sample for family in stand.metrics.registry.collect() for sample in family.samples]
    return {(sample.name, tuple(sample.labels.items()), sample.value) for sample in samples}


async def test_an_analysis_costs_no_forward_and_counts_toward_nothing(texts: Any) -> None:
    before = counted(texts)
    told = await analyzed(texts, "a (red:1.5) circle", negative_prompt="a [star:heart:0.5]", num_inference_steps=10)
    assert counted(texts) == before
    assert (told["model"], told["family"], told["num_inference_steps"]) == ("shapes", "sd", 10)
    assert [(moment["first"], moment["last"]) for moment in told["schedule"]] == [(0, 4), (5, 9)]
    assert {unit["tier"] for unit in told["units"]} == {"encoded"}
    assert [unit["sign"] for unit in told["units"]] == ["positive", "negative", "negative"]
    heavy = [t["text"].strip() for row in told["readings"][0]["rows"] for t in row["tokens"] if t["weight"] == 1.5]
    assert heavy == ["red"]


async def test_an_analysis_says_where_each_unit_is(texts: Any) -> None:
    prompt = "a green heart on a white background"
    await embedded(texts, prompt=prompt)
    (unit,) = (await analyzed(texts, prompt))["units"]
    assert unit["tier"] == "memory"
    texts.embeddings.clear()
    tiers = [unit["tier"] for unit in (await analyzed(texts, prompt, negative_prompt="never seen"))["units"]]
    assert tiers[1] == "encoded"
    stored = {"redis", "encoded"}  # the pool's process writes Redis in a moment of its own
    assert tiers[0] in stored
    for _ in range(100):
        (unit,) = (await analyzed(texts, prompt))["units"]
        if unit["tier"] == "redis":
            break
        await asyncio.sleep(0.02)
    assert unit["tier"] == "redis"
    hits = texts.embeddings.stats().hits
    assert (hits.memory, hits.redis, hits.encoded) == (0, 0, 1), "to look is no use"


async def test_the_units_of_an_analysis_are_those_of_the_job(texts: Any) -> None:
    order = {"prompt": "a (red:1.2) circle", "negative_prompt": "a star"}
    units = {unit["key"] for unit in (await analyzed(texts, **order))["units"]}
    job = await texts.jobs.get((await texts.create(**order))["id"])
    assert units == {unit.key for unit in texts.planner.plan(job.request.text).units}


async def test_a_prompt_that_can_t_be_drawn_can_t_be_analyzed(texts: Any, refused: Any) -> None:
    for order, param in (
        ({"prompt": "a <nothing>"}, "prompt"),
        ({"prompt": "a", "template": "x"}, "template"),
        ({}, "prompt"),
    ):
        refused(await texts.client.post("/v1/prompts/analyze", json=order), 422, param)
    refused(await texts.client.post("/v1/prompts/analyze", json={"prompt": "a", "model": "x"}), 404, "model")
    refused(await texts.client.post("/v1/prompts/analyze", json={"prompt": "a", "stepz": 1}), 422, "stepz")
    refused(await texts.client.post("/v1/prompts/analyze?x=1", json={"prompt": "a"}), 422, "x")


async def test_advice_and_notes_are_told(texts: Any) -> None:
    told = await analyzed(texts, '("a (red:2) circle", "a blue circle").blend(1, 1)', negative_prompt="circle")
    assert [note["code"] for note in told["notes"]] == ["normalized"]
    assert {"heavy", "contradiction"} <= {note["code"] for note in told["advice"]}
    told = await analyzed(texts, "a red circle", negative_prompt="a star", guidance_scale=1.0)
    assert [note["code"] for note in told["advice"]] == ["unread"]


async def test_similar_texts_are_near_and_each_is_itself(texts: Any) -> None:
    prompts = ["a large red circle", "a large crimson circle", "a small yellow star on a black background"]
    answer = await texts.client.post("/v1/prompts/similarity", json={"prompts": prompts})
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["compared"]
    matrix = found["matrix"]
    assert [matrix[n][n] for n in range(3)] == pytest.approx([1, 1, 1], abs=1e-5)
    assert matrix == [list(column) for column in zip(*matrix, strict=True)]
    assert matrix[0][1] > matrix[0][2]
    forwards = texts.metrics.value(FORWARDS)
    again = await texts.client.post("/v1/prompts/similarity", json={"prompts": prompts[::-1]})
    assert again.json()["compared"][0]["matrix"][0][2] == matrix[0][2]
    assert texts.metrics.value(FORWARDS) == forwards, "the cache has them"


async def test_every_family_compares_by_each_of_its_encoders(stand_on: Any, redis_url: str, tmp_path: Path) -> None:
    makers = {"sdxl": sdxl_folder, "sd3": sd3_folder, "flux": flux_folder}
    models = tuple(ModelSettings(source=str(make(tmp_path / name))) for name, make in makers.items())
    async with stand_on(redis_url, tmp_path, text_models=models) as stand:
        by = {}
        for name in makers:
            order = {"prompts": ["a red circle", "a red circle", "(a red circle:1.2) [b|c]"], "model": name}
            answer = await stand.client.post("/v1/prompts/similarity", json=order)
            assert answer.status_code == 200, answer.text
            for found in answer.json()["compared"]:
                assert found["matrix"][0][1] == pytest.approx(1, abs=1e-5)
                assert found["matrix"][0][2] < 0.9999, "plain texts, brackets and all"
            by[name] = [found["by"] for found in answer.json()["compared"]]
        assert by == {
            "sdxl": ["pooled", "projected"],
            "sd3": ["projected", "projected", "mean"],
            "flux": ["pooled", "mean"],
        }
        one = {"prompts": ["a", "b"], "model": "flux", "encoder": "text_encoder_2"}
        (found,) = (await stand.client.post("/v1/prompts/similarity", json=one)).json()["compared"]
        assert found["by"] == "mean"


@pytest.mark.parametrize(
    ("order", "param"),
    [
        ({"prompts": ["a"]}, "prompts"),
        ({"prompts": ["a"] * 17}, "prompts"),
        ({"prompts": ["a", " "]}, "prompts.1"),
        ({"prompts": ["a", 1]}, "prompts.1"),
        ({"prompts": ["a", "b\u0000"]}, "prompts.1"),
        ({"prompts": ["a", "," * 8193]}, "prompts.1"),
        ({"prompts": ["a", "b"], "encoder": "t5"}, "encoder"),
        ({"prompts": ["a", "b"], "size": 1}, "size"),
        ({}, "prompts"),
    ],
)
async def test_bad_comparisons_are_refused(texts: Any, order: dict[str, Any], param: str, refused: Any) -> None:
    refused(await texts.client.post("/v1/prompts/similarity", json=order), 422, param)
    assert texts.metrics.value(FORWARDS) == 0


async def test_they_are_for_who_may_encode(stand_on: Any, redis_url: str, tmp_path: Path, refused: Any) -> None:
    async with stand_on(redis_url, tmp_path, keys=KeySettings(required=True)) as stand:
        embeds, draws = await stand.key(scopes=[Scope.EMBED]), await stand.key(scopes=[Scope.GENERATE])
        for path, order in (("analyze", {"prompt": "a"}), ("similarity", {"prompts": ["a", "b"]})):
            ask = stand.client.post
            refused(await ask(f"/v1/prompts/{path}", json=order), 401, None)
            refused(await ask(f"/v1/prompts/{path}", json=order, headers=draws), 403, None)
            assert (await ask(f"/v1/prompts/{path}", json=order, headers=embeds)).status_code == 200


async def test_an_order_by_template_says_so_and_is_counted(texts: Any) -> None:
    order = {"prompt": None, "template": "portrait", "variables": {"subject": "circle"}, "seed": 5}
    job = await texts.create(**order)
    assert job["request"]["prompt"] in ("a red circle", "a blue circle")
    assert job["request"]["negative_prompt"] == "a star"
    assert (job["template"], job["arm"]) == ("portrait", None)
    assert (await texts.create(**order))["request"]["prompt"] == job["request"]["prompt"], "the seed decides"
    arms = [(await texts.create(template="test", seed=seed))["arm"] for seed in range(20)]
    assert set(arms) == {"plain", "rich"}
    named = await texts.create(template="test", arm="rich")
    assert (named["arm"], named["request"]["prompt"]) == ("rich", "a large a red circle")
    value = texts.metrics.value
    assert value("tandem_template_orders_total", template="portrait", arm="") == 2
    assert value("tandem_template_orders_total", template="test", arm="rich") == arms.count("rich") + 1
    assert value("tandem_template_orders_total") == 23


async def test_a_replay_and_a_dry_run_count_no_order_of_a_template(texts: Any) -> None:
    order, key = {"prompt": "a", "template": "test"}, {"idempotency-key": "k"}
    first = await texts.client.post("/v1/jobs", json=order, headers=key)
    again = await texts.client.post("/v1/jobs", json=order, headers=key)
    assert again.json()["id"] == first.json()["id"]
    assert again.json()["arm"] == first.json()["arm"]
    quote = await texts.client.post("/v1/jobs?dry_run=true", json=order | {"arm": "plain"})
    assert (quote.json()["template"], quote.json()["arm"]) == ("test", "plain")
    assert texts.metrics.value("tandem_template_orders_total") == 1


@pytest.mark.parametrize(
    "order",
    [
        {"prompt": "a {red|blue|green} (circle:1.2)"},
        {"prompt": "a {shape}", "variables": {"shape": "{circle|square}"}},
        {"prompt": [{"text": "a {red|blue} circle", "weight": 0.7}, {"text": "a square", "weight": 0.7}]},
        {"prompt": "a circle", "schedule": [{"from": 5, "to": 0.75, "prompt": "a star", "ramp": True}]},
        {"prompt": None, "template": "portrait", "variables": {"subject": "circle"}},
        {"prompt": "red++ circle", "prompt_syntax": "compel", "prompt_weighting": "compel", "long_prompt": "window"},
        {"prompt": "a {red|blue} (circle)", "prompt_syntax": "plain"},
        {"prompt": "a red circle AND a blue square :0.5"},
    ],
)
async def test_a_job_s_request_is_an_order_for_the_same_pictures(texts: Any, order: dict[str, Any]) -> None:
    job = await texts.create(**order)
    again = await texts.client.post("/v1/jobs", json=job["request"])
    assert again.status_code == 202, again.text
    assert again.json()["request"] == job["request"]
    first, second = [(await texts.jobs.get(each["id"])).request for each in (job, again.json())]
    assert dataclasses.replace(second, template=first.template, arm=first.arm) == first
    assert texts.planner.plan(first.text) == texts.planner.plan(second.text)


async def test_the_record_and_every_answer_tell_tokens_rows_and_notes(texts: Any) -> None:
    blend = [{"text": "a red circle", "weight": 1}, {"text": "a blue circle", "weight": 1}]
    job = await texts.create(prompt=blend, negative_prompt="a star, " * 60)
    assert [note["code"] for note in job["notes"]] == ["normalized"]
    counts = {count["field"]: count for count in job["tokens"]}
    assert counts["prompt"]["chunks"] == 1
    assert counts["negative_prompt"]["chunks"] > 1
    assert counts["negative_prompt"]["cut"] == 0
    assert (await texts.client.get(f"/v1/jobs/{job['id']}")).json()["tokens"] == job["tokens"]
    quote = await texts.client.post("/v1/jobs?dry_run=true", json={"prompt": blend})
    assert quote.json()["notes"] == job["notes"]
    report = await embedded(texts, prompt=blend)
    assert report["notes"] == job["notes"]
    assert texts.metrics.value("tandem_prompt_chunks_total") >= counts["negative_prompt"]["chunks"] + 2


async def test_what_was_cut_is_told_with_its_text(texts: Any) -> None:
    long = ", ".join("a red circle" for _ in range(40))
    job = await texts.create(prompt=long, long_prompt="head")
    (cut,) = job["truncated"]
    assert long.endswith(cut["text"])
    assert cut["tokens"] - cut["limit"] == next(each["cut"] for each in job["tokens"] if each["field"] == "prompt")
    assert texts.metrics.value("tandem_truncated_prompts_total") == 1


async def test_a_composition_is_told_to_the_engine_and_needs_guidance(texts: Any, refused: Any) -> None:
    prompt = "a red circle AND a blue square"
    job = await texts.jobs.get((await texts.create(prompt=prompt))["id"])
    assert (job.request.composed, job.request.lanes) == (2, 3)
    error = refused(await texts.client.post("/v1/jobs", json={"prompt": prompt, "guidance_scale": 1.0}), 422, "prompt")
    assert "AND" in error["message"]
    refused(await texts.client.post("/v1/embeddings", json={"prompt": prompt}), 422, "prompt")
    assert texts.metrics.value(FORWARDS) == 0


async def test_the_rule_and_the_policy_reach_the_planner(texts: Any) -> None:
    job = await texts.create(prompt="(red)1.3 circle", prompt_syntax="compel", prompt_weighting="compel")
    request = (await texts.jobs.get(job["id"])).request
    assert request.text.weighting is Weighting.COMPEL
    assert parse(request.prompt, syntax=request.prompt_syntax) == parse("(red:1.3) circle")


async def test_the_embeddings_of_a_step(texts: Any, refused: Any) -> None:
    from safetensors.torch import load

    async def tensors(**order: Any) -> Any:
        answer = await texts.client.post("/v1/embeddings", json=order)
        assert answer.status_code == 200, answer.text
        return load(answer.content)["prompt_embeds"]

    switching = {"prompt": "a [red:blue:5] circle", "num_inference_steps": 10}
    red, blue = await tensors(prompt="a red circle"), await tensors(prompt="a blue circle")
    assert (await tensors(**switching)).equal(red)
    assert (await tensors(**switching, step=4)).equal(red)
    assert (await tensors(**switching, step=5)).equal(blue)
    half = await tensors(prompt=[{"text": "a red circle"}, {"text": "a blue circle"}])
    assert half.allclose((red + blue) / 2, atol=1e-6)
    refused(await texts.client.post("/v1/embeddings", json=switching | {"step": 10}), 422, "step")


async def test_a_sweep_of_weights_blends_and_steps_asks_for_nothing_new(texts: Any) -> None:
    orders = {
        "weight": [{"prompt": f"a (red:{1 + n / 10}) circle"} for n in range(1, 11)],
        "blend": [{"prompt": [{"text": "a red circle", "weight": n}, {"text": "a star", "weight": 10 - n}]}
                  for n in range(1, 11)],
        "switch": [{"prompt": f"a [green:blue:{n}] circle", "num_inference_steps": 20} for n in range(1, 11)],
    }  # fmt: skip
    for name, sweep in orders.items():
        await embedded(texts, **sweep[0])
        forwards = texts.metrics.value(FORWARDS)
        for order in sweep[1:]:
            await embedded(texts, **order)
        assert texts.metrics.value(FORWARDS) == forwards, name


async def test_the_command_asks_the_server(texts: Any) -> None:
    async def tandem(*arguments: str, code: int = 0) -> str:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "serve.cli", "prompt", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"COLUMNS": "80"},
        )
        out, err = await process.communicate()
        assert process.returncode == code, err.decode()
        assert b"Traceback" not in err
        return (out or err).decode()

    async with listening(texts.app) as port:
        url = ("--url", f"http://127.0.0.1:{port}")
        told = await tandem("a (red:1.5) [circle:star:0.5]", "--negative", "a circle", "--steps", "10", *url)
        assert "a red:1.5 circle" in told
        assert re.search(r"^ *5-9 +a \(red:1.5\) star", told, re.MULTILINE)
        assert "3 units of text: 3 to encode" in told
        assert max(map(len, told.splitlines())) <= 80
        told = await tandem("--template", "portrait", "--var", "subject=circle", "--seed", "5", *url)
        assert re.search(r"^template +portrait", told, re.MULTILINE)
        assert "matrix" in await tandem("a circle", "a ring", "--json", *url)
        assert "no concept is named <cat>" in await tandem("a <cat>", *url, code=2)
        assert texts.metrics.value("tandem_jobs_total") == 0


class Held:
    """Concepts that are told of when they may be."""

    def __init__(self) -> None:
        self.asked, self.free = threading.Event(), threading.Event()

    def find(self, name: str) -> None:
        self.asked.set()
        assert self.free.wait(30)

    def names(self) -> frozenset[str]:
        return frozenset()


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs?dry_run=true", "/v1/embeddings", "/v1/prompts/analyze"])
async def test_nobody_waits_while_a_long_prompt_is_read(texts: Any, path: str) -> None:
    texts.planner.concepts = held = Held()
    long = asyncio.create_task(texts.client.post(path, json={"prompt": "a <heart>, " + "a red circle, " * 100}))
    assert await asyncio.to_thread(held.asked.wait, 30)
    assert (await texts.client.post("/v1/prompts/analyze", json={"prompt": "a red circle"})).status_code == 200
    assert not long.done()
    held.free.set()
    answer = await long
    assert answer.status_code == 422
    assert "heart" in answer.json()["error"]["message"]


async def test_one_piece_alone_is_read_whole_and_says_so(texts: Any) -> None:
    told = await analyzed(texts, [{"text": "a red circle", "weight": 2}])
    (note,) = told["notes"]
    assert (note["code"], note["field"]) == ("normalized", "prompt")
    assert "2 of a blend add up to 2; they are read as 1" in note["message"]
    assert not (await analyzed(texts, [{"text": "a red circle"}]))["notes"]
