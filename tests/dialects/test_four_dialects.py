"""The same order in four dialects: the same picture, and the same refusal in each one's own shape."""

import base64
import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.dialects import A1111, DIALECTS, IMAGEN, NATIVE, OPENAI, Dialect
from support.drawing import Drawing
from support.pictures import written

from serve.callers import Scope

JSON = {"content-type": "application/json"}
ORDER = {
    "prompt": "a red circle on a blue background",
    "negative_prompt": "green",
    "size": (64, 64),
    "num_inference_steps": 4,
    "guidance_scale": 2.5,
}

Pixels = NDArray[np.uint8]


def pixels(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def send(drawing: Drawing, dialect: Dialect, **order: Any) -> httpx.Response:
    path, body = dialect.order(**order)
    if dialect is NATIVE:
        path += "?wait=true"
    return httpx.post(drawing.url + path, content=body, headers=JSON, timeout=60)


def files(drawing: Drawing, dialect: Dialect, **order: Any) -> list[bytes]:
    """The pictures of an order in a dialect that waits for them."""
    answer = send(drawing, dialect, **order)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    if dialect is NATIVE:
        return [httpx.get(drawing.url + image["url"]).content for image in told["images"]]
    found = told["images"] if dialect is A1111 else [each["b64_json"] for each in told["data"]]
    return [base64.b64decode(file) for file in found]


def drawn(drawing: Drawing, dialect: Dialect, **order: Any) -> list[Pixels]:
    return list(map(pixels, files(drawing, dialect, **order)))


def says(file: bytes) -> Any:
    """What a picture holds of its order."""
    return json.loads(Image.open(io.BytesIO(file)).text["tandem"])


def same(one: list[Pixels], other: list[Pixels]) -> bool:
    return len(one) == len(other) and all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


def test_the_same_order_is_the_same_pictures(drawing: Drawing) -> None:
    order = ORDER | {"seed": 7, "num_images": 2}
    found = [files(drawing, dialect, **order) for dialect in (NATIVE, OPENAI, A1111)]
    native, openai, a1111 = (list(map(pixels, each)) for each in found)
    assert native[0].shape == (64, 64, 3)
    assert not np.array_equal(*native)
    assert same(native, openai)
    assert same(native, a1111)
    told = [[says(file) for file in each] for each in found]
    assert told[0] == told[1] == told[2], "they say the same of themselves, whoever ordered them"


def test_an_order_of_imagen_s_is_the_same_picture_as_the_native_one_of_its_seed(drawing: Drawing) -> None:
    words = {name: ORDER[name] for name in ("prompt", "negative_prompt")}
    job = send(drawing, IMAGEN, **words).json()["job_id"]
    httpx.get(f"{drawing.url}/v1/jobs/{job}/events", timeout=60)  # until it has ended
    result = httpx.get(f"{drawing.url}/status/{job}").json()["result"]
    file = httpx.get(f"{drawing.url}/outputs/{result['filename']}").content
    assert same([pixels(file)], drawn(drawing, NATIVE, **words, seed=result["seed"]))


def test_the_same_order_from_a_picture_is_the_same_picture(drawing: Drawing) -> None:
    order = ORDER | {"seed": 7, "image": written(mode="RGB"), "strength": 0.75}
    native, openai, a1111 = (drawn(drawing, dialect, **order) for dialect in (NATIVE, OPENAI, A1111))
    assert same(native, openai)
    assert same(native, a1111)


@pytest.mark.parametrize(
    ("order", "status"),
    [
        ({"prompt": ""}, 422),
        ({"prompt": "a\x00b"}, 422),
        ({"prompt": "a (red:1.2.3)"}, 422),
        ({"prompt": "a", "num_inference_steps": 100_000}, 422),
        ({"prompt": "a", "model": "other"}, 404),
    ],
)
def test_the_same_refusal_has_each_dialect_s_shape(drawing: Drawing, order: dict[str, Any], status: int) -> None:
    reasons = set()
    for dialect in DIALECTS:
        if not dialect.can(*order) or (dialect is IMAGEN and "(" in order["prompt"]):  # another syntax
            continue
        answer = send(drawing, dialect, **order)
        message, param = dialect.told(answer)
        assert answer.status_code == status, answer.text
        assert param == dialect.param(list(order)[-1])
        reasons.add(message.removeprefix(param))
    assert len(reasons) == 1 or "model" in order, reasons  # A1111's is an option, which says what there is


def test_the_same_want_of_a_key_has_each_dialect_s_shape(drawing_with: Any) -> None:
    with drawing_with(keys={"required": True}, worker=False) as server:
        for dialect in DIALECTS:
            path, body = dialect.order(prompt="a red circle")
            none = httpx.post(server.url + path, content=body, headers=JSON)
            assert (none.status_code, none.headers["www-authenticate"]) == (401, "Bearer")
            dialect.told(none)
            lacking = {"x-api-key": server.key(scopes=frozenset({Scope.EMBED}))}
            answer = httpx.post(server.url + path, content=body, headers=JSON | lacking)
            assert answer.status_code == 403
            assert "generate" in dialect.told(answer)[0]


def test_the_same_full_queue_has_each_dialect_s_shape(drawing_with: Any) -> None:
    with drawing_with(jobs={"max_queued": 1}, worker=False) as server:
        assert httpx.post(f"{server.url}/v1/jobs", json={"prompt": "a"}).status_code == 202
        for dialect in DIALECTS:
            answer = send(server, dialect, prompt="a red circle")
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["x-should-retry"] == "false"
            assert dialect.told(answer)[0]
