"""A1111's options: each API key has its own, at whichever replica of the server it sets them."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import webuiapi
from support.drawing import Drawing

from serve.settings.front import KeySettings

DEFAULTS = {
    "sd_model_checkpoint": "shapes",
    "sd_checkpoint_hash": "",
    "sd_vae": "Automatic",
    "CLIP_stop_at_last_layers": 1,
    "samples_format": "png",
    "jpeg_quality": 80,
    "show_progress_every_n_steps": 10,
    "live_previews_enable": True,
}


@pytest.fixture(scope="module")
def server(drawing_with: Any) -> Iterator[Drawing]:
    with drawing_with(keys=KeySettings(required=True)) as drawing:
        yield drawing


def client(server: Drawing) -> webuiapi.WebUIApi:
    """With a key of its own."""
    return webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1", username="anybody", password=server.key())


def test_what_one_key_sets_no_other_sees(server: Drawing) -> None:
    one, other = client(server), client(server)
    assert one.get_options() == DEFAULTS
    assert one.set_options({"CLIP_stop_at_last_layers": 2, "samples_format": "jpg"}) is None
    assert one.set_options({"jpeg_quality": 60, "eta_noise_seed_delta": 31337}) is None
    assert one.get_options() == DEFAULTS | {
        "CLIP_stop_at_last_layers": 2,
        "samples_format": "jpeg",
        "jpeg_quality": 60,
    }
    assert other.get_options() == DEFAULTS
    one.set_options({"CLIP_stop_at_last_layers": None, "samples_format": "png", "jpeg_quality": None})
    assert one.get_options() == DEFAULTS


def test_orders_go_by_the_options_of_their_key(server: Drawing) -> None:
    one, other = client(server), client(server)
    one.set_options({"samples_format": "webp", "CLIP_stop_at_last_layers": 2})
    order = {"prompt": "a red circle", "steps": 4, "width": 64, "height": 64, "seed": 1}
    by_one, by_other = one.txt2img(**order), other.txt2img(**order)
    assert (by_one.image.format, by_one.info["clip_skip"]) == ("WEBP", 2)
    assert (by_other.image.format, by_other.info["clip_skip"]) == ("PNG", 1)
    for_once = one.txt2img(**order, override_settings={"samples_format": "png"})
    assert (for_once.image.format, for_once.info["clip_skip"]) == ("PNG", 2)
    assert one.get_options()["samples_format"] == "webp"


def test_all_that_was_read_can_be_written_back(server: Drawing) -> None:
    api = client(server)
    api.set_options(api.get_options())
    assert api.get_options() == DEFAULTS


def test_the_client_chooses_a_model_by_what_is_near(server: Drawing, capsys: pytest.CaptureFixture[str]) -> None:
    api = client(server)
    api.util_set_model("SHAPE")
    assert api.util_get_current_model() == "shapes"
    api.set_options({"sd_model_checkpoint": "shapes.safetensors [0123456789]"})
    assert api.get_options()["sd_model_checkpoint"] == "shapes"
    capsys.readouterr()  # what the client says of it


@pytest.mark.parametrize(
    ("given", "status", "param"),
    [
        ({"sd_model_checkpoint": "v1-5"}, 404, "sd_model_checkpoint"),
        ({"CLIP_stop_at_last_layers": 13}, 422, "CLIP_stop_at_last_layers"),
        ({"samples_format": "gif", "jpeg_quality": 60}, 422, "samples_format"),
        ({"live_previews_enable": [1]}, 422, "live_previews_enable"),
        ([], 422, "body"),
    ],
)
def test_a_wrong_option_is_named_and_none_is_set(server: Drawing, given: Any, status: int, param: str) -> None:
    headers = {"x-api-key": server.key()}
    url = f"{server.url}/sdapi/v1/options"
    answer = httpx.post(url, json=given, headers=headers)
    assert answer.status_code == status
    assert answer.json()["param"] == param
    assert answer.json().keys() == {"error", "detail", "body", "errors", "param"}
    assert httpx.get(url, headers=headers).json() == DEFAULTS
