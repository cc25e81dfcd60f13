"""`info`: what an answer in A1111's dialect says of its pictures."""

import json
from dataclasses import replace
from typing import Any

from serve.domain.jobs import ImageRef, Job, JobState
from serve.domain.orders import ImageRequest
from serve.results.info import info_json
from serve.results.infotext import read_text

REQUEST = ImageRequest(
    model="shapes",
    prompt="a cat",
    negative_prompt="a dog",
    width=64,
    height=96,
    num_inference_steps=8,
    guidance_scale=5.0,
    seed=10,
    num_images=2,
    scheduler="dpmpp_2m_karras",
)


def job(request: ImageRequest, drawn: int | None = None, state: JobState = JobState.SUCCEEDED) -> Job:
    images = tuple(
        ImageRef(
            index=n,
            key=f"{'0' * 32}/{n}.png",
            seed=request.seed_of(n),
            width=request.width,
            height=request.height,
            content_type="image/png",
            bytes=1,
        )
        for n in range(request.num_images if drawn is None else drawn)
    )
    return Job(
        id="0" * 32,
        state=state,
        request=request,
        attempt=1,
        step=8,
        steps=8,
        created_at=1_790_000_000.0,
        images=images,
    )


def info(*jobs: Job, **more: Any) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(info_json(jobs, **{"batch_size": 2} | more))
    return told


def test_two_rounds_of_two_pictures() -> None:
    told = info(job(REQUEST), job(replace(REQUEST, seed=12)), styles=["oil"])
    assert told["seed"] == 10
    assert told["all_seeds"] == [10, 11, 12, 13]
    assert told["all_subseeds"] == [-1] * 4
    assert told["subseed_strength"] == 0
    assert told["all_prompts"] == ["a cat"] * 4
    assert told["all_negative_prompts"] == ["a dog"] * 4
    assert (told["width"], told["height"]) == (64, 96)
    assert (told["sampler_name"], told["steps"], told["cfg_scale"]) == ("DPM++ 2M", 8, 5.0)
    assert told["extra_generation_params"] == {"Schedule type": "Karras"}
    assert (told["batch_size"], told["styles"], told["clip_skip"]) == (2, ["oil"], 1)
    assert (told["sd_model_name"], told["denoising_strength"]) == ("shapes", None)
    assert told["job_timestamp"] == "20260921141320"
    assert [read_text(text)["Seed"] for text in told["infotexts"]] == ["10", "11", "12", "13"]
    assert told["infotexts"][0] == (
        "a cat\nNegative prompt: a dog\nSteps: 8, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5, Seed: 10, "
        "Size: 64x96, Model: shapes"
    )


def test_what_was_interrupted_was_wanted_but_is_not_there() -> None:
    told = info(job(REQUEST), job(replace(REQUEST, seed=12), drawn=0, state=JobState.CANCELLED))
    assert told["all_seeds"] == [10, 11, 12, 13]
    assert len(told["infotexts"]) == 2
    assert info(job(REQUEST, drawn=0, state=JobState.CANCELLED))["infotexts"] == []


def test_a_variation_keeps_its_seed() -> None:
    varied = replace(REQUEST, variation_seed=5, variation_strength=0.25)
    told = info(job(varied), subseed=5)
    assert told["all_seeds"] == [10, 10]
    assert told["all_subseeds"] == [5, 6]
    assert told["subseed_strength"] == 0.25
    assert info(job(REQUEST), subseed=5)["all_subseeds"] == [5, 6]


def test_a_hires_fix_is_told_by_its_first_pass() -> None:
    second = replace(REQUEST, width=128, height=192, strength=0.7, image=f"{'0' * 32}/0.png", num_inference_steps=4)
    more = {"Size": "64x96", "Steps": 8, "Hires upscale": 2, "Hires steps": 4, "Hires upscaler": "Lanczos"}
    told = info(job(second), more=lambda _: more)
    assert (told["width"], told["height"], told["steps"], told["denoising_strength"]) == (64, 96, 8, 0.7)
    assert told["extra_generation_params"]["Hires upscale"] == 2
    back = read_text(told["infotexts"][1])
    assert (back["Size-1"], back["Hires steps"], back["Denoising strength"], back["Seed"]) == ("64", "4", "0.7", "11")


def test_each_second_pass_is_told_by_its_own_first() -> None:
    """Of a hires fix with a prompt of its own. The second round was ended before its second pass."""
    second = replace(REQUEST, prompt="fur", strength=0.7, image=f"{'0' * 32}/0.png")
    more = {"Prompt": "a first cat", "Size": "64x96", "Hires prompt": "fur"}
    jobs = job(second), job(replace(REQUEST, seed=12))
    told = info(*jobs, more=lambda each: more if each is jobs[0] else {})
    assert (told["prompt"], told["all_prompts"]) == ("a first cat", ["a first cat"] * 2 + ["a cat"] * 2)
    assert told["all_negative_prompts"] == ["a dog"] * 4
    back = read_text(told["infotexts"][0])
    assert (back["Prompt"], back["Hires prompt"], back["Negative prompt"]) == ("a first cat", "fur", "a dog")
    assert told["extra_generation_params"] == {"Schedule type": "Karras", "Hires prompt": "fur"}
    assert "Hires prompt" not in read_text(told["infotexts"][2])
