"""A1111's lists, as `webuiapi` and others read them. The server is one that draws with the shipped model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import webuiapi
from fastapi.routing import APIRoute
from safetensors.torch import save_file
from support.drawing import Drawing

from serve.api import sdapi_lists, sdapi_options, sdapi_png
from serve.models.samplers import sampler_names
from serve.settings.front import KeySettings
from serve.settings.orders import ConceptSettings, PromptSettings, TemplateSettings

STYLES = {
    "oil": TemplateSettings(text="an oil painting of {prompt}", negative_prompt="photo"),
    "portrait": TemplateSettings(text="a portrait of {subject}"),
}


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that the shipped model can read, and one that it can't."""
    folder = tmp_path_factory.mktemp("concepts")
    save_file({"emb_params": torch.zeros(3, 128)}, folder / "heart.safetensors")
    save_file({"emb_params": torch.zeros(1, 77)}, folder / "other.safetensors")
    return folder


@pytest.fixture(scope="module")
def server(drawing_with: Any, concepts: Path) -> Iterator[Drawing]:
    rooms = {
        "prompts": PromptSettings(templates=STYLES),
        "concepts": ConceptSettings(folder=concepts),
        "keys": KeySettings(required=True),
    }
    with drawing_with(worker=False, **rooms) as drawing:
        yield drawing


@pytest.fixture(scope="module")
def api(server: Drawing) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1", username="anybody", password=server.key())


def test_the_client_finds_what_it_looks_for_when_it_is_made(api: webuiapi.WebUIApi) -> None:
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert not api.has_controlnet


def test_models(api: webuiapi.WebUIApi) -> None:
    assert api.util_get_model_names() == ["shapes"]
    assert api.util_get_current_model() == "shapes"
    (model,) = api.get_sd_models()
    assert model.keys() == {"title", "model_name", "hash", "sha256", "filename", "config"}
    assert "/" not in model["filename"]


def test_samplers_and_schedulers(api: webuiapi.WebUIApi) -> None:
    samplers = {each["name"]: each for each in api.get_samplers()}
    assert {"Euler a", "Euler", "DPM++ 2M", "DDIM", "UniPC"} <= samplers.keys()
    assert not any("Karras" in name for name in samplers)
    assert samplers["DPM++ 2M"]["options"] == {"scheduler": "karras"}
    assert "k_euler_a" in samplers["Euler a"]["aliases"]
    assert len(samplers) <= len(sampler_names("diffusion"))
    assert api.util_get_scheduler_names() == ["automatic", "karras", "uniform"]
    assert [each["label"] for each in api.get_schedulers()] == ["Automatic", "Uniform", "Karras"]


def test_styles_are_the_templates_that_need_only_a_prompt(api: webuiapi.WebUIApi) -> None:
    assert api.get_prompt_styles() == [
        {"name": "oil", "prompt": "an oil painting of {prompt}", "negative_prompt": "photo"}
    ]


def test_embeddings_are_the_concepts(api: webuiapi.WebUIApi) -> None:
    told = api.get_embeddings()
    unknown = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
    assert told["loaded"] == {"heart": unknown | {"shape": 128, "vectors": 3}}
    assert told["skipped"] == {"other": unknown | {"shape": 0, "vectors": 0}}


def test_memory_is_told_in_bytes(api: webuiapi.WebUIApi) -> None:
    told = api.get_memory()
    assert told["ram"]["free"] + told["ram"]["used"] == told["ram"]["total"] > 1 << 28
    assert told["cuda"] == {"error": "unavailable"}


def test_what_there_is_none_of_is_an_empty_list(api: webuiapi.WebUIApi, server: Drawing) -> None:
    assert [each["name"] for each in api.get_upscalers()] == ["Lanczos"]
    for empty in (
        api.get_latent_upscale_modes,
        api.get_loras,
        api.get_sd_vae,
        api.get_hypernetworks,
        api.get_face_restorers,
        api.get_realesrgan_models,
    ):
        assert empty() == []
    assert api.get_cmd_flags() == {"api": True, "nowebui": True}
    assert api.refresh_checkpoints() == {}
    headers = {"x-api-key": server.key()}
    for path in ("script-info", "extensions"):
        assert httpx.get(f"{server.url}/sdapi/v1/{path}", headers=headers, params={"unknown": "1"}).json() == []
    for path in ("refresh-vae", "refresh-loras"):
        assert httpx.post(f"{server.url}/sdapi/v1/{path}", headers=headers).json() == {}


ROUTES = [*sdapi_lists.router.routes, *sdapi_options.router.routes, *sdapi_png.router.routes]
PATHS = [(method, route.path) for route in ROUTES if isinstance(route, APIRoute) for method in route.methods]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_nobody_is_served_without_a_key(server: Drawing, method: str, path: str) -> None:
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == 401
    assert answer.json()["error"] == "unauthorized"
    assert answer.json()["detail"] == answer.json()["errors"]
