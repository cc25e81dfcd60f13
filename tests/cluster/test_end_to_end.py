"""From a prompt to a picture, through Ray Serve, over HTTP. The shipped model draws, the judge looks."""

import json
import os
import signal
import statistics

import httpx
import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.orders import STEPS, difference, finished, picture, submit
from support.server import Server, wait_until

from serve.shapes import WEIGHTS
from serve.shapes.judge import read

pytestmark = pytest.mark.cluster


def test_pictures_obey_their_prompts(http: httpx.Client) -> None:
    wanted = [
        ("red", "circle", "blue"),
        ("yellow", "star", "black"),
        ("green", "square", "white"),
        ("blue", "heart", "pink"),
    ]
    ids = [submit(http, f"a {color} {shape} on a {ground} background", seed=1) for color, shape, ground in wanted]
    for job_id, (color, shape, ground) in zip(ids, wanted, strict=True):
        reading = read(picture(http, finished(http, job_id)))
        assert (reading.background, reading.things[0].color, reading.things[0].shape) == (ground, color, shape)


def test_the_image_is_that_of_the_stock_pipeline(http: httpx.Client) -> None:
    prompt, negative = "a white star on a purple background", "black"
    stock = StableDiffusionPipeline.from_pretrained(WEIGHTS, local_files_only=True, dtype=torch.float32)
    expected = stock(
        prompt,
        negative_prompt=negative,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(42),
    ).images[0]
    job = finished(http, submit(http, prompt, negative_prompt=negative, guidance_scale=5.0, seed=42))
    assert difference(picture(http, job), expected) <= 1


def test_a_job_that_had_to_queue_seldom_waits_for_its_text(
    http: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text is encoded while the job waits: what is left for the replica is a look into Redis."""
    colors, grounds = ("red", "green", "blue", "yellow", "purple"), ("white", "black", "pink", "orange")
    prompts = [
        f"a {color} {shape} on a {ground} background"
        for color in colors
        for ground in grounds
        for shape in ("star", "circle")
    ]
    ids = [submit(http, prompt, negative_prompt="dull") for prompt in prompts]
    jobs = [finished(http, job_id) for job_id in ids]
    queued = [job["timings"] for job in jobs if job["timings"]["queued_s"] > 0.3]
    late = sum(timings["text_from"] == "encoded" for timings in queued)
    with capsys.disabled():
        median_ms = 1000 * statistics.median(timings["text_s"] for timings in queued)
        print(f"\n{len(queued)} jobs queued, median wait for text {median_ms:.1f} ms, {late} waited for an encoder")
    assert len(queued) >= 8
    assert sum(job["cache"]["encoded"] for job in jobs) >= len(prompts)
    assert late <= len(queued) // 10


def test_events_tell_every_state_in_order(http: httpx.Client) -> None:
    job_id = submit(http, "a pink diamond on a green background", seed=2)
    events = []
    with http.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("data:"):
                events.append(json.loads(line.removeprefix("data:")))
    states = list(dict.fromkeys(event["state"] for event in events))
    every = ["queued", "encoding", "running", "storing", "succeeded"]
    assert states == [state for state in every if state in states]
    # The pulse tells the latest: what lasts for a moment may have passed by then.
    assert {"queued", "encoding", "running", "succeeded"} <= set(states)
    steps = [event["step"] for event in events]
    assert steps == sorted(steps)
    assert steps[-1] == STEPS


def test_other_weights_need_no_forward(http: httpx.Client) -> None:
    words = "a purple cross on an orange background"
    first = finished(http, submit(http, words, negative_prompt="blurry", seed=3))
    assert first["cache"] == {"memory": 0, "redis": 0, "encoded": 2}
    weighted = words.replace("purple", "(purple:1.3)")
    again = finished(http, submit(http, weighted, negative_prompt="(blurry:0.8)", seed=3))
    assert again["cache"] == {"memory": 2, "redis": 0, "encoded": 0}
    assert difference(picture(http, first), picture(http, again)) > 0


def test_sixteen_mixed_jobs_equal_their_solo_runs(http: httpx.Client) -> None:
    orders = [
        {
            "prompt": f"a {color} {shape} on a white background",
            "seed": number,
            "num_inference_steps": 6 + number,
            "guidance_scale": [1.0, 3.0, 5.0, 7.5][number % 4],
        }
        for number, (color, shape) in enumerate(
            (color, shape)
            for color in ("red", "blue", "green", "black")
            for shape in ("circle", "star", "ring", "square")
        )
    ]
    together = [submit(http, **order) for order in orders]
    jobs = [finished(http, job_id) for job_id in together]
    mixed = [picture(http, job) for job in jobs]
    spans = [(job["started_at"], job["finished_at"]) for job in jobs]
    assert max(sum(start <= at < end for start, end in spans) for at, _ in spans) >= 4, "they ran one after another"
    for order, image in zip(orders, mixed, strict=True):
        alone = picture(http, finished(http, submit(http, **order)))
        assert difference(image, alone) <= 1


def test_a_killed_replica_loses_nothing(http: httpx.Client, server: Server) -> None:
    order = {"prompt": "a blue triangle on a yellow background", "seed": 9, "num_inference_steps": 150, "num_images": 8}
    job_id = submit(http, **order)
    wait_until(lambda: http.get(f"/v1/jobs/{job_id}").json()["step"] >= 2, 60, "the job to be under way")
    (victim,) = server.replica_pids("Diffusion")
    os.kill(victim, signal.SIGKILL)
    job = finished(http, job_id)
    assert job["state"] == "succeeded"
    assert job["attempt"] == 2
    assert [image["index"] for image in job["images"]] == list(range(8))
    stored = sorted(path.name for path in (server.data_dir / "images" / job_id).iterdir())
    assert stored == [*(f"{index}.png" for index in range(8)), "manifest.json"]


def test_cancel_ends_a_running_job_at_the_next_step(http: httpx.Client) -> None:
    job_id = submit(http, "a red heart", num_inference_steps=150, num_images=8)
    wait_until(lambda: http.get(f"/v1/jobs/{job_id}").json()["step"] >= 1, 60, "the job to be under way")
    asked_at = http.delete(f"/v1/jobs/{job_id}").json()["step"]
    job = finished(http, job_id)
    assert job["state"] == "cancelled"
    assert job["step"] <= asked_at + 10


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 9000}, "prompt"),
        ({"prompt": "x", "guidance_scale": "NaN"}, "guidance_scale"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps"),
        ({"prompt": "x", "num_inference_steps": 1000}, "num_inference_steps"),
        ({"prompt": "x", "width": 130}, "width"),
        ({"prompt": "x", "model": "sdxl"}, "model"),
        ({"prompt": "x", "strenght": 1}, "strenght"),
    ],
)
def test_bad_input_is_named(http: httpx.Client, body: dict, field: str) -> None:
    answer = http.post("/v1/jobs", json=body, headers={"x-request-id": "mine"})
    assert 400 <= answer.status_code < 500
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert answer.json()["error"]["param"] == field


def test_unbalanced_brackets_close_themselves(http: httpx.Client) -> None:
    job = finished(http, submit(http, "a ((red circle on a blue background", seed=4))
    assert read(picture(http, job)).things[0].color == "red"


def test_everything_stands_ready_and_described(http: httpx.Client) -> None:
    assert http.get("/healthz").status_code == 200
    assert set(http.get("/readyz").json()["pools"]) == {"jobs", "results", "text-encoder:clip-128x2", "diffusion"}
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["shapes"]
    assert "/v1/jobs" in http.get("/openapi.json").json()["paths"]
