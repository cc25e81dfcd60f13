"""What pictures say of themselves: written by this server, read by it and by A1111's client."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import webuiapi
from PIL import Image, PngImagePlugin
from support.captioners import llava_folder, one_thread
from support.drawing import Drawing

from serve.api.sdapi_png import A1111PngInfo
from serve.client import Client
from serve.settings.pools import CaptionSettings

ORDER = {"prompt": "a red circle, on a blue background", "negative_prompt": "green", "steps": 4, "seed": 7}


@pytest.fixture(scope="module")
def api(drawing: Drawing) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{drawing.url}/sdapi/v1")


@pytest.fixture(scope="module")
def drawn(api: webuiapi.WebUIApi) -> Any:
    return api.txt2img(**ORDER, sampler_name="DPM++ 2M", scheduler="Karras", width=64, height=64, batch_size=2)


def test_the_answer_says_what_each_picture_says(drawn: Any) -> None:
    assert drawn.info["all_seeds"] == [7, 8]
    assert drawn.info["sampler_name"] == "DPM++ 2M"
    assert [image.info["parameters"] for image in drawn.images] == drawn.info["infotexts"]


def test_a_picture_is_read_back_to_what_was_ordered(api: webuiapi.WebUIApi, drawn: Any) -> None:
    """The client sends the picture as it got it, encoded anew, with the texts that it had."""
    told = api.png_info(drawn.images[1])
    assert told.info == drawn.info["infotexts"][1]
    assert json.loads(told.json["items"]["tandem"])["scheduler"] == "dpmpp_2m_karras"
    parameters = told.parameters
    assert parameters.pop("CFG scale") == f"{drawn.info['cfg_scale']:g}"
    assert parameters == {
        "Prompt": ORDER["prompt"],
        "Negative prompt": "green",
        "Steps": "4",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "Seed": "8",
        "Size-1": "64",
        "Size-2": "64",
        "Model": "shapes",
    }


def test_a_jpeg_is_read_back_too(api: webuiapi.WebUIApi, drawing: Drawing) -> None:
    order = ORDER | {"width": 64, "height": 64, "override_settings": {"samples_format": "jpg"}}
    answer = httpx.post(f"{drawing.url}/sdapi/v1/txt2img", json=order, timeout=60).json()
    (image,) = answer["images"]
    assert Image.open(io.BytesIO(base64.b64decode(image))).format == "JPEG"
    told = httpx.post(f"{drawing.url}/sdapi/v1/png-info", json={"image": image}).json()
    assert told["info"] == json.loads(answer["info"])["infotexts"][0]
    assert told["parameters"]["Prompt"] == ORDER["prompt"]


def encoded(kind: str = "PNG", size: tuple[int, int] = (8, 8), **options: Any) -> str:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def noted(text: str) -> PngImagePlugin.PngInfo:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", text)
    return notes


def test_the_documents_example_is_read(drawing: Drawing) -> None:
    (example,) = A1111PngInfo.model_json_schema()["examples"]
    told = httpx.post(f"{drawing.url}/sdapi/v1/png-info", json=example).json()
    assert told["parameters"] == {
        "Prompt": "a cat",
        "Negative prompt": "",
        "Steps": "4",
        "Seed": "1",
        "Size-1": "8",
        "Size-2": "8",
    }


def test_a_picture_of_somebody_else(drawing: Drawing) -> None:
    silent = httpx.post(f"{drawing.url}/sdapi/v1/png-info", json={"image": encoded(), "unknown": 1})
    assert silent.json() == {"info": "", "items": {}, "parameters": {}}
    other = encoded(pnginfo=noted("drawn by hand"))
    told = httpx.post(f"{drawing.url}/sdapi/v1/png-info", json={"image": f"data:image/png;base64,{other}"})
    assert told.json() == {"info": "", "items": {"Comment": "drawn by hand"}, "parameters": {}}


@pytest.mark.parametrize(
    "image",
    [
        "",
        "no base64",
        "http://127.0.0.1/x.png",
        encoded("GIF"),
        encoded()[:40],
        encoded(size=(5000, 5000)),
        encoded("PNG", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]),
        encoded(pnginfo=noted("x" * (1 << 20) + "y")),
        None,
        7,
    ],
)
def test_what_is_no_picture_is_refused_by_name(drawing: Drawing, image: Any) -> None:
    answer = httpx.post(f"{drawing.url}/sdapi/v1/png-info", json={"image": image})
    assert answer.status_code == 422
    assert answer.json()["param"] == "image"


def test_a_picture_is_interrogated(drawing_with: Any, tmp_path: Path) -> None:
    """`clip` is whatever describes here. Its words are those of the native route, for any colour of one picture."""
    folder = llava_folder(tmp_path / "a-llava")
    with (
        one_thread(),
        drawing_with(worker=False, captions=CaptionSettings(source=str(folder), max_new_tokens=6)) as server,
    ):
        api = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")
        told = {colour: api.interrogate(Image.new("RGB", (48, 40), colour)).info for colour in ("red", "green")}
        with Client(server.url) as client:
            native = {colour: client.caption(Image.new("RGB", (48, 40), colour)) for colour in told}
        assert told == {colour: said.caption for colour, said in native.items()}
        assert told["red"] != told["green"]
        assert {said.model for said in native.values()} == {"a-llava"}
        with pytest.raises(RuntimeError) as refused:
            api.interrogate(Image.new("RGB", (48, 40)), model="deepdanbooru")
        assert refused.value.args[0] == 404


def test_nothing_here_describes_pictures(api: webuiapi.WebUIApi) -> None:
    """The refusal is the one that the client knows of A1111, for a model that it has not."""
    with pytest.raises(RuntimeError) as refused:
        api.interrogate(Image.new("RGB", (8, 8)))
    status, text = refused.value.args
    assert status == 404
    assert json.loads(text)["param"] == "model"
