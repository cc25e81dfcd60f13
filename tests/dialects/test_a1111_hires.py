"""Hires fix in the A1111 dialect, by its client: a picture, enlarged and drawn over."""

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image
from support.a1111 import Replica, api_of, beside, pixels
from support.drawing import Drawing

from serve.shapes.judge import agrees_with_prompt

WORDS = "a red circle on a blue background"
SMALL = {"prompt": WORDS, "seed": 7, "steps": 2, "width": 64, "height": 64, "cfg_scale": 1.0}
HIRES = SMALL | {"enable_hr": True}


@pytest.fixture(scope="module")
def api(drawing: Drawing) -> Any:
    return api_of(drawing)


@pytest.fixture(scope="module")
def server(drawing_with: Any) -> Iterator[Drawing]:
    """Jobs move by hand, and one alone may wait."""
    with drawing_with(worker=False, jobs={"max_queued": 1}) as drawing:
        yield drawing


@pytest.fixture(scope="module")
def replica(server: Drawing) -> Replica:
    return Replica(server)


def test_the_picture_is_enlarged_and_drawn_over(api: Any) -> None:
    order = {"prompt": WORDS, "seed": 3, "steps": 8, "width": 64, "height": 64}
    large = api.txt2img(**order, enable_hr=True, denoising_strength=0.5, hr_upscaler="Latent")
    assert large.image.size == (128, 128)
    assert agrees_with_prompt(large.image, WORDS).ok
    text = large.image.info["parameters"]
    assert text == large.info["infotexts"][0]
    told = {"Size: 64x64", "Hires upscale: 2", "Hires steps: 8", "Hires upscaler: Lanczos", "Denoising strength: 0.5"}
    assert told <= set(text.split("\n")[-1].split(", "))
    assert "Steps: 8" in text
    assert (large.info["width"], large.info["height"], large.info["seed"]) == (64, 64, 3)


@pytest.mark.slow
def test_each_picture_of_a_call_has_its_second_pass(api: Any) -> None:
    many = api.txt2img(**HIRES, n_iter=2, hr_scale=1.5)
    assert [image.size for image in many.images] == [(96, 96)] * 2
    assert many.info["all_seeds"] == [7, 8]
    last = api.txt2img(**HIRES | {"seed": 8}, hr_scale=1.5)
    assert abs(pixels(many.images[1]) - pixels(last.image)).max() <= 1


def test_the_second_pass_starts_from_the_first(api: Any) -> None:
    small = api.txt2img(**SMALL)
    near = api.txt2img(**HIRES, denoising_strength=0.01, hr_second_pass_steps=1)
    assert 0 < abs(pixels(near.image.resize((64, 64))) - pixels(small.image)).mean() < 12


@pytest.mark.parametrize(
    ("order", "size"),
    [
        ({"hr_resize_x": 128}, (128, 64)),
        ({"hr_resize_y": 96}, (192, 96)),
        ({"hr_resize_x": 96, "hr_resize_y": 96}, (96, 96)),
    ],
)
def test_the_second_size_may_be_written(
    server: Drawing, replica: Replica, order: dict[str, int], size: tuple[int, int]
) -> None:
    call = beside(httpx.post, url=f"{server.url}/sdapi/v1/txt2img", json=HIRES | {"width": 128} | order, timeout=60)
    replica.finish(replica.claim())
    second = replica.claim()
    assert (second.request.width, second.request.height) == size
    replica.finish(second)
    told = f"Hires resize: {order.get('hr_resize_x', 0)}x{order.get('hr_resize_y', 0)}"
    assert told in json.loads(call.result(30).json()["info"])["infotexts"][0]


def test_the_second_pass_has_settings_of_its_own(server: Drawing, replica: Replica) -> None:
    own = {
        "steps": 20,
        "hr_prompt": "a star",
        "hr_second_pass_steps": 3,
        "hr_sampler_name": "DDIM",
        "denoising_strength": 0.4,
    }
    call = beside(httpx.post, url=f"{server.url}/sdapi/v1/txt2img", json=HIRES | own, timeout=60)
    first = replica.claim()
    assert (first.request.prompt, first.request.num_inference_steps, first.request.scheduler) == (WORDS, 20, None)
    replica.finish(first)
    second = replica.claim()
    request = second.request
    assert (request.prompt, request.scheduler, request.strength, request.seed) == ("a star", "ddim", 0.4, 7)
    assert int(request.num_inference_steps * 0.4) == 3  # as many steps are made as were asked for
    told = httpx.get(f"{server.url}/sdapi/v1/progress").json()
    assert (told["state"]["job_count"], told["state"]["job_no"], told["progress"]) == (2, 1, 0.5)
    replica.finish(second)
    info = json.loads(call.result(30).json()["info"])
    assert info["prompt"] == "a star"
    assert "Hires prompt: a star" in info["infotexts"][0]


def test_a_choice_is_made_once_for_both_passes(server: Drawing, replica: Replica) -> None:
    order = HIRES | {"prompt": "a {red|blue|green|pink|white} star", "batch_size": 2}
    call = beside(httpx.post, url=f"{server.url}/sdapi/v1/txt2img", json=order, timeout=60)
    first = replica.claim()
    replica.finish(first)
    for _ in range(2):  # the queue has room for one of them at a time: the others wait for it
        second = replica.claim()
        assert second.request.prompt == first.request.prompt
        replica.finish(second)
    assert len(call.result(30).json()["images"]) == 2


def test_interrupted_between_both_passes_the_pictures_are_the_first_ones(server: Drawing, replica: Replica) -> None:
    call = beside(httpx.post, url=f"{server.url}/sdapi/v1/txt2img", json=HIRES, timeout=60)
    replica.finish(replica.claim())
    second = replica.claim()
    httpx.post(f"{server.url}/sdapi/v1/interrupt").raise_for_status()
    replica.let_go(second)
    answer = call.result(30).json()
    (image,) = answer["images"]
    assert Image.open(io.BytesIO(base64.b64decode(image))).size == (64, 64)
    assert "Hires" not in answer["info"]


def test_interrupted_before_the_second_pass_it_never_comes(server: Drawing, replica: Replica) -> None:
    call = beside(httpx.post, url=f"{server.url}/sdapi/v1/txt2img", json=HIRES, timeout=60)
    first = replica.claim()
    httpx.post(f"{server.url}/sdapi/v1/interrupt").raise_for_status()
    replica.finish(first)  # too late to be ended, and too early for the next pass
    assert len(call.result(30).json()["images"]) == 1
    assert httpx.get(f"{server.url}/v1/jobs?state=queued").json()["data"] == []


@pytest.fixture(scope="module")
def http(drawing: Drawing) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=drawing.url) as client:
        yield client


REFUSED = {
    "hr_scale": [{"hr_scale": 0.5}, {"hr_scale": 1e308}, {"hr_scale": 40}],
    "hr_resize_x": [{"hr_resize_x": 5000}, {"hr_resize_x": -1}],
    "hr_resize_y": [{"hr_resize_x": 64, "hr_resize_y": 10**30}],
    "denoising_strength": [{"denoising_strength": 0}, {"denoising_strength": 1.1}],
    "steps": [{"denoising_strength": 1e-300}, {"steps": 0}],
    "hr_second_pass_steps": [{"hr_second_pass_steps": 140, "denoising_strength": 0.5}, {"hr_second_pass_steps": -1}],
    "hr_sampler_name": [{"hr_sampler_name": "Restart"}],
    "hr_scheduler": [{"hr_sampler_name": "Euler a", "hr_scheduler": "Karras"}],
    "hr_prompt": [{"hr_prompt": "(" * 300}],
}


@pytest.mark.parametrize(("param", "order"), [(name, order) for name, orders in REFUSED.items() for order in orders])
def test_a_second_pass_that_there_can_not_be_is_refused_before_the_first(
    http: httpx.Client, param: str, order: dict[str, Any]
) -> None:
    answer = http.post("/sdapi/v1/txt2img", json=HIRES | order)
    assert answer.status_code == 422, answer.text
    assert answer.json()["param"] == param
