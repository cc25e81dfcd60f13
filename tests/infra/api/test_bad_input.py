"""Every class of bad input, in every dialect that has the field: refused in that dialect's shape, by its own name of
the field, soon, and without an order."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.dialects import A1111, DIALECTS, IMAGEN, NATIVE, OPENAI, Dialect, refused
from support.pictures import bomb, written
from support.speaking import Speaking, speaking_on

from serve.embedded import EmbeddedRedis
from serve.jobs.terms import StepCurve, WorkerReport

JSON = {"content-type": "application/json"}


GIF = written("GIF")
MOVING = written("WEBP", save_all=True, append_images=[Image.new("RGB", (64, 64), "red")], duration=50)
URL = "http://169.254.169.254/latest/meta-data"

FIELDS: dict[str, dict[str, Any]] = {
    "a prompt of a megabyte": {"prompt": "x" * 1_000_000},
    "an empty prompt": {"prompt": ""},
    "a prompt that is no text": {"prompt": 7},
    "a prompt of objects": {"prompt": {"text": "a"}},
    "NUL": {"prompt": "a\x00b"},
    "a control character": {"prompt": "a\x1b[2Jb"},
    "half of a surrogate pair": {"prompt": "a\ud800b"},
    "NUL in a negative prompt": {"negative_prompt": "a\x00b"},
    "half of a surrogate pair in a negative prompt": {"negative_prompt": "\udfff"},
    "not a number": {"guidance_scale": float("nan")},
    "infinity": {"guidance_scale": float("inf")},
    "less than nothing": {"guidance_scale": float("-inf")},
    "a number beyond floats": {"guidance_scale": 10**400},
    "a boolean for a number": {"guidance_scale": True},
    "a boolean for steps": {"num_inference_steps": True},
    "text for steps": {"num_inference_steps": "twenty"},
    "half a step": {"num_inference_steps": 2.5},
    "no steps": {"num_inference_steps": 0},
    "a million steps": {"num_inference_steps": 1_000_000},
    "a boolean for pictures": {"num_images": True},
    "no pictures": {"num_images": 0},
    "a billion pictures": {"num_images": 10**9},
    "a huge seed": {"seed": 10**400},
    "a seed over 32 bits": {"seed": 2**32},
    "a negative seed": {"seed": -2},
    "a boolean for a seed": {"seed": True},
    "a width of nothing": {"width": 0},
    "a width of a million": {"width": 1_000_000},
    "a negative height": {"height": -64},
    "an address in place of a picture": {"image": URL},
    "a path in place of a picture": {"image": "file:///etc/passwd"},
    "another job's path": {"image": "../../etc/passwd/0"},
    "no picture": {"image": ""},
    "what is no base64": {"image": "%%%%"},
    "what is no picture": {"image": base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode()},
    "a GIF": {"image": GIF},
    "a GIF that says it is a PNG": {"image": f"data:image/png;base64,{GIF}"},
    "a picture that moves": {"image": MOVING},
    "a picture of CMYK": {"image": written("JPEG", mode="CMYK")},
    "a picture cut short": {"image": written()[:-80]},
    "a picture of one pixel": {"image": written(size=(1, 1))},
    "a bomb": {"image": bomb()},
    "a bomb as a mask": {"image": written(), "mask": bomb()},
    "an address in place of a mask": {"image": written(), "mask": URL},
    "a GIF as a mask": {"image": written(), "mask": GIF},
    "a mask of another size": {"image": written(), "mask": written(size=(72, 64), mode="LA")},
    "a strength of nothing": {"image": written(), "strength": 0},
    "a strength that is no number": {"image": written(), "strength": float("nan")},
}
"""The last field is at fault."""

CASES = [
    pytest.param(dialect, order, id=f"{dialect.name}: {name}")
    for name, order in FIELDS.items()
    for dialect in DIALECTS
    if dialect.can(*order)
]


@pytest.mark.parametrize(("dialect", "order"), CASES)
def test_a_bad_field_is_refused_by_its_name(dialect: Dialect, order: dict[str, Any], speaking: Speaking) -> None:
    path, body = dialect.order(**{"prompt": "a red circle"} | order)
    message, param = refused(speaking, dialect, 422, path, content=body, headers=JSON)
    expected = dialect.param(list(order)[-1])
    assert param is not None
    assert param.split(".")[: expected.count(".") + 1] == expected.split("."), (param, message)
    assert message.startswith(param), message


OWN: list[tuple[Dialect, dict[str, Any]]] = [
    (OPENAI, {"size": "64by64"}),
    (OPENAI, {"size": "9" * 5000}),
    (OPENAI, {"quality": "ultra"}),
    (OPENAI, {"response_format": "file"}),
    (OPENAI, {"background": "transparent"}),
    (OPENAI, {"stream": True, "partial_images": 4}),
    (OPENAI, {"output_format": "gif"}),
    (OPENAI, {"output_format": "jpeg", "output_compression": 101}),
    (A1111, {"n_iter": 10**9}),
    (A1111, {"batch_size": 4, "n_iter": 10**6}),
    (A1111, {"sampler_name": "Nobody's"}),
    (A1111, {"scheduler": "Nobody's"}),
    (A1111, {"styles": ["nobody's"]}),
    (A1111, {"subseed_strength": 1.5}),
    (A1111, {"alwayson_scripts": {"a script": {"args": [1]}}}),
    (A1111, {"enable_hr": True, "hr_scale": 1e6}),
    (A1111, {"enable_hr": True, "hr_resize_x": 10**9}),
    (A1111, {"enable_hr": True, "hr_second_pass_steps": 10**9}),
    (A1111, {"override_settings": {"CLIP_stop_at_last_layers": 99}}),
    (A1111, {"override_settings": "all"}),
    (IMAGEN, {"ip_strength": 0.5}),
    (IMAGEN, {"ip_strength": float("nan")}),
]
"""Fields that a dialect alone has. The last one is at fault."""


@pytest.mark.parametrize(("dialect", "fields"), OWN, ids=[f"{each.name}: {fields}"[:60] for each, fields in OWN])
def test_a_bad_field_of_a_dialect_s_own_is_refused_by_its_name(
    dialect: Dialect, fields: dict[str, Any], speaking: Speaking
) -> None:
    body = json.dumps({"prompt": "a red circle"} | fields).encode()
    _, param = refused(speaking, dialect, 422, dialect.path, content=body, headers=JSON)
    assert param is not None
    assert param.split(".")[0] == list(fields)[-1]


@pytest.mark.parametrize("dialect", [each for each in DIALECTS if each.can("model")], ids=lambda each: each.name)
@pytest.mark.parametrize("model", ["other", "\u2028\n", "../../etc", "x" * 300], ids=["other", "lines", "path", "long"])
def test_a_model_that_is_not_served_is_told_so(dialect: Dialect, model: str, speaking: Speaking) -> None:
    path, body = dialect.order(prompt="a red circle", model=model)
    # A name that can't be one of any model's is a bad field, but among A1111's options anything may stand.
    bad = dialect.name != "a1111" and len(model) > 256
    _, param = refused(speaking, dialect, 422 if bad else 404, path, content=body, headers=JSON)
    assert param == dialect.param("model")


ROUTES = [(dialect, path) for dialect in DIALECTS for path in dict.fromkeys((dialect.path, dialect.picture)) if path]
each_route = pytest.mark.parametrize(("dialect", "path"), ROUTES, ids=[path for _, path in ROUTES])


@each_route
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 400),
        (b"\xff", 400),
        (b"[" * 100_000, 400),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", 400),
        (b"null", 422),
        (b"[]", 422),
        (b'"prompt"', 422),
    ],
    ids=["none", "cut", "bytes", "deep", "long number", "null", "list", "text"],
)  # fmt: skip
def test_a_bad_body_is_refused(dialect: Dialect, path: str, body: bytes, status: int, speaking: Speaking) -> None:
    _, param = refused(speaking, dialect, status, path, content=body, headers=JSON)
    assert param == "body"


@each_route
@pytest.mark.parametrize("kind", ["text/plain", "", "nonsense"])
def test_a_body_of_another_kind_is_refused(dialect: Dialect, path: str, kind: str, speaking: Speaking) -> None:
    _, param = refused(speaking, dialect, 415, path, content=b'{"prompt": "a"}', headers={"content-type": kind})
    assert param == "body"


@each_route
def test_a_body_over_the_bound_is_refused_before_it_is_read(dialect: Dialect, path: str, speaking: Speaking) -> None:
    read = []

    async def endless() -> Any:
        while True:
            read.append(1)
            yield bytes(1 << 20)

    for content, parts in ((b"x" * (33 << 20), 0), (endless(), 33)):
        _, param = refused(speaking, dialect, 413, path, content=content, headers=JSON)
        assert param == "body"
        assert len(read) <= parts


@each_route
def test_fields_that_nobody_knows(dialect: Dialect, path: str, speaking: Speaking) -> None:
    """They are refused by name in the native dialect, and ignored where clients are known to send them."""
    order = {"prompt": "a red circle"} | ({"image": written()} if path != dialect.path else {})
    _, body = dialect.order(**order)
    content = json.dumps(json.loads(body) | {"frobnicate\n": 1}).encode()
    if dialect.name == "native":
        _, param = refused(speaking, dialect, 422, path, content=content, headers=JSON)
        assert param == "frobnicate\\n"
    else:
        assert speaking.send("POST", path, content=content, headers=JSON).is_success


def test_a_product_that_takes_too_long_is_refused_though_each_field_is_good(
    redis_server: EmbeddedRedis, tmp_path: Path, stand_on: Any
) -> None:
    pictures = {"prompt": "a red circle", "num_inference_steps": 10, "num_images": 8}
    with speaking_on(stand_on, redis_server.url, tmp_path, jobs={"timeout_s": 10.0}) as speaking:
        curve = StepCurve(height=8, width=8, ms={1: 500.0, 2: 500.0, 4: 500.0})
        slow = WorkerReport(
            name="slow", model="shapes", placement="shapes", max_pixels=1 << 20, max_rows=4, batch=2, vae_factor=8,
            curves=(curve,),
        )  # fmt: skip
        speaking.run(speaking.stand.jobs.report(slow))
        speaking.stand.app.state.service._door.jobs._heard_at = -10.0  # reads the reports anew
        for dialect in (NATIVE, OPENAI, A1111):
            path, body = dialect.order(**pictures)
            message, param = refused(speaking, dialect, 422, path, content=body, headers=JSON)
            assert "jobs.timeout_s" in message
            assert param == dialect.param("num_images")
