"""Pictures from text in the A1111 dialect, by its client."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.a1111 import api_of, pixels, until
from support.drawing import Drawing

from serve.settings.front import HttpSettings
from serve.settings.orders import PromptSettings, TemplateSettings
from serve.shapes.captions import held_out_prompts
from serve.shapes.judge import agrees, agrees_with_prompt, read

WORDS = "a red circle on a blue background"
SMALL = {"prompt": WORDS, "seed": 7, "steps": 2, "width": 64, "height": 64, "cfg_scale": 1.0}
STYLES = {"oil": TemplateSettings(text="an oil painting of {prompt}", negative_prompt="photo")}


@pytest.fixture(scope="module")
def api(drawing: Drawing) -> Any:
    return api_of(drawing)


@pytest.fixture(scope="module")
def idle(drawing_with: Any) -> Iterator[Drawing]:
    """Nobody draws there, at most two jobs wait, and nobody waits for long."""
    rooms = {"http": HttpSettings(wait_s=0.15), "prompts": PromptSettings(templates=STYLES)}
    with drawing_with(worker=False, jobs={"max_queued": 2}, **rooms) as server:
        yield server


def queued(server: Drawing, **order: Any) -> dict[str, Any]:
    """What an order comes to, of which nothing is drawn."""
    assert httpx.post(f"{server.url}/sdapi/v1/txt2img", json={"prompt": WORDS} | order).status_code == 504
    (job,) = httpx.get(f"{server.url}/v1/jobs", params={"state": "queued"}).json()["data"]
    httpx.delete(f"{server.url}/v1/jobs/{job['id']}").raise_for_status()
    request: dict[str, Any] = job["request"]
    return request


def test_a_picture_is_what_was_asked_for(api: Any) -> None:
    answer = api.txt2img(prompt=WORDS, seed=3, steps=20, width=128, height=128)
    assert agrees_with_prompt(answer.image, WORDS).ok
    assert answer.image.info["parameters"] == answer.info["infotexts"][0]


@pytest.mark.slow
def test_pictures_are_what_was_asked_for(api: Any) -> None:
    prompts = held_out_prompts(20)
    found = [
        agrees(read(api.txt2img(prompt=prompt, seed=3, steps=20, width=128, height=128).image), scene)
        for prompt, scene in prompts
    ]
    assert sum(verdict.ok for verdict in found) >= 16


def test_pictures_of_a_call_have_seeds_in_a_row(api: Any) -> None:
    many = api.txt2img(**SMALL, batch_size=2, n_iter=2)
    assert many.info["all_seeds"] == [7, 8, 9, 10]
    assert many.info["batch_size"] == 2
    last = api.txt2img(**SMALL | {"seed": 10})
    assert abs(pixels(many.images[3]) - pixels(last.image)).max() <= 1
    assert len({image.tobytes() for image in many.images}) == 4


def test_pictures_vary_by_another_seed(api: Any) -> None:
    plain = api.txt2img(**SMALL)
    varied = api.txt2img(**SMALL, subseed=4, subseed_strength=0.1, n_iter=2)
    assert (varied.info["all_seeds"], varied.info["all_subseeds"]) == ([7, 7], [4, 5])
    for image in varied.images:
        assert 0 < abs(pixels(image) - pixels(plain.image)).mean() < 60
    far = api.txt2img(**SMALL, sampler_name="DDIM", subseed=4, subseed_strength=1.0)
    other = api.txt2img(**SMALL | {"seed": 4}, sampler_name="DDIM")
    assert abs(pixels(far.image) - pixels(other.image)).max() <= 1


def test_a_random_seed_is_told(idle: Drawing) -> None:
    first, second = (queued(idle, seed=-1)["seed"] for _ in range(2))
    assert first != second


def test_samplers_go_by_their_names_there(api: Any, drawing: Drawing) -> None:
    answer = api.txt2img(**SMALL, sampler_name="DPM++ 2M", scheduler="Karras")
    assert json.loads(answer.image.info["tandem"])["scheduler"] == "dpmpp_2m_karras"
    assert answer.info["extra_generation_params"]["Schedule type"] == "Karras"
    assert json.loads(api.txt2img(**SMALL).image.info["tandem"])["scheduler"] == "euler_a"  # what the client sends


def test_settings_are_overridden_for_one_call(api: Any) -> None:
    override = {"sd_model_checkpoint": "shapes [0123456789]", "CLIP_stop_at_last_layers": 2, "samples_format": "jpg"}
    answer = api.txt2img(**SMALL, override_settings={**override, "eta_noise_seed_delta": 31337})
    assert answer.image.format == "JPEG"
    assert answer.info["clip_skip"] == 2
    assert answer.parameters["override_settings"] == override
    assert api.txt2img(**SMALL).image.format == "PNG"


def test_pictures_may_stay_away(api: Any) -> None:
    answer = api.txt2img(**SMALL, send_images=False)
    assert answer.images == []
    assert len(answer.info["infotexts"]) == 1


def test_what_a_client_leaves_out_is_the_models(idle: Drawing) -> None:
    request = queued(idle, steps=None, unheard_of=1)
    told = {name: request[name] for name in ("num_inference_steps", "width", "height", "guidance_scale", "scheduler")}
    assert told == {"num_inference_steps": 20, "width": 128, "height": 128, "guidance_scale": 3.0, "scheduler": None}


@pytest.fixture(scope="module")
def http(drawing: Drawing) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=drawing.url) as client:
        yield client


REFUSED = {
    "prompt": [{"prompt": ""}, {"prompt": "(" * 300}, {"prompt": "\x00"}],
    "steps": [{"steps": 0}, {"steps": 10**400}, {"steps": "many"}, {"steps": True}],
    "cfg_scale": [{"cfg_scale": 51}, {"cfg_scale": "warm"}],
    "width": [{"width": 99999}, {"width": -8}],
    "height": [{"height": 0}],
    "seed": [{"seed": 2**32}, {"seed": -2}, {"seed": 2**32 - 1, "n_iter": 2}],
    "subseed": [{"subseed": 2**40, "subseed_strength": 0.5}],
    "subseed_strength": [{"subseed_strength": 1.1}],
    "batch_size": [{"batch_size": 0}, {"batch_size": 10**9}],
    "n_iter": [{"n_iter": 0}, {"n_iter": 1000}, {"n_iter": 500, "batch_size": 2}],
    "sampler_name": [{"sampler_name": "Restart"}],
    "scheduler": [{"sampler_name": "Euler a", "scheduler": "Karras"}],
    "styles": [{"styles": ["none such"]}],
    "restore_faces": [{"restore_faces": True}],
    "tiling": [{"tiling": True}],
    "script_name": [{"script_name": "X/Y/Z plot"}],
    "alwayson_scripts.ControlNet": [{"alwayson_scripts": {"ControlNet": {"args": [{"enabled": True}]}}}],
    "override_settings.CLIP_stop_at_last_layers": [{"override_settings": {"CLIP_stop_at_last_layers": 13}}],
}


@pytest.mark.parametrize(("param", "order"), [(name, order) for name, orders in REFUSED.items() for order in orders])
def test_a_refusal_names_the_field_as_the_client_does(http: httpx.Client, param: str, order: dict[str, Any]) -> None:
    answer = http.post("/sdapi/v1/txt2img", json=SMALL | order)
    assert answer.status_code == 422, answer.text
    told = answer.json()
    assert set(told) >= {"error", "detail", "body", "errors"}
    assert told["param"] == param


def test_a_model_that_there_is_not_is_a_404(api: Any) -> None:
    with pytest.raises(RuntimeError) as refusal:
        api.txt2img(**SMALL, override_settings={"sd_model_checkpoint": "sd_xl_base_1.0.safetensors [31e35c80fc]"})
    assert refusal.value.args[0] == 404
    assert "override_settings.sd_model_checkpoint" in refusal.value.args[1]


def test_scripts_that_a_client_switches_off_are_no_matter(api: Any) -> None:
    api.txt2img(**SMALL | {"steps": 1}, alwayson_scripts={"ADetailer": {"args": [False]}, "ControlNet": {"args": []}})


def test_braces_are_text(idle: Drawing) -> None:
    """Where the engine would see a variable."""
    assert queued(idle, prompt=r"{masterpiece}, \{a\}")["prompt"] == r"\{masterpiece\}, \{a\}"


def test_styles_are_put_around_the_prompt(idle: Drawing) -> None:
    request = queued(idle, prompt="a star", negative_prompt="rain", styles=["oil"])
    assert (request["prompt"], request["negative_prompt"]) == ("an oil painting of a star", "rain, photo")


def test_who_would_wait_too_long_is_told_where_the_job_is(idle: Drawing) -> None:
    answer = httpx.post(f"{idle.url}/sdapi/v1/txt2img", json={"prompt": "a star"})
    assert answer.status_code == 504
    assert answer.headers["x-should-retry"] == "false"
    job = httpx.get(f"{idle.url}{answer.headers['Location']}").json()
    assert job["state"] == "queued"
    assert job["id"] in answer.json()["detail"]
    httpx.delete(f"{idle.url}/v1/jobs/{job['id']}")


def test_a_call_is_queued_as_a_whole_or_not_at_all(idle: Drawing) -> None:
    answer = httpx.post(f"{idle.url}/sdapi/v1/txt2img", json={"prompt": "a star", "n_iter": 4})
    assert answer.status_code == 503
    assert answer.json()["error"] == "queue_full"
    assert float(answer.headers["Retry-After"]) > 0
    queued = f"{idle.url}/v1/jobs?state=queued&state=encoding"
    until(lambda: httpx.get(queued).json()["data"] == [])
    assert httpx.get(f"{idle.url}/sdapi/v1/progress").json()["state"]["job_count"] == 0
