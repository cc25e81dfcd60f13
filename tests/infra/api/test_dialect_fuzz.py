"""Whatever JSON comes, in any dialect: no 5xx, the dialect's own shape, and a field named.

The native order has a test of its own (`test_api_input.py`)."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dialects import A1111, IMAGEN, NATIVE, OPENAI, Dialect
from support.pictures import written
from support.speaking import Speaking

from serve.api.openai_orders import EditOrder, GenerationOrder
from serve.api.sdapi_schemas import ImageToImage, TextToImage

FEW, MANY = 12, 300
PICTURE = written(size=(16, 16))
TASK = ("id_task", "id_live_preview", "live_preview")
OPTIONS = ("sd_model_checkpoint", "CLIP_stop_at_last_layers", "samples_format", "jpeg_quality", "live_previews_enable")
ROUTES: dict[str, tuple[Dialect, tuple[str, ...], dict[str, Any]]] = {
    "/v1/images/generations": (OPENAI, tuple(GenerationOrder.model_fields), {"prompt": "a (red:1.2) circle"}),
    "/v1/images/edits": (OPENAI, tuple(EditOrder.model_fields), {"images": [{"image_url": PICTURE}], "prompt": "a"}),
    "/v1/images/variations": (OPENAI, tuple(EditOrder.model_fields), {"images": [{"image_url": PICTURE}]}),
    "/sdapi/v1/txt2img": (A1111, tuple(TextToImage.model_fields), {"prompt": "a (red:1.2) circle"}),
    "/sdapi/v1/img2img": (A1111, tuple(ImageToImage.model_fields), {"prompt": "a", "init_images": [PICTURE]}),
    "/sdapi/v1/options": (A1111, OPTIONS, {}),
    "/sdapi/v1/png-info": (A1111, ("image",), {"image": PICTURE}),
    "/internal/progress": (A1111, TASK, {}),
    "/generate": (IMAGEN, ("prompt", "negative_prompt", "ip_strength"), {"prompt": "a red++ circle"}),
    "/v1/embeddings": (NATIVE, ("negative_prompt", "dtype", "step", "model", "width"), {"prompt": "a"}),
    "/v1/prompts/analyze": (NATIVE, ("negative_prompt", "schedule", "variables", "arm"), {"prompt": "a"}),
    "/v1/prompts/similarity": (NATIVE, ("encoder", "model"), {"prompts": ["a", "b"]}),
}
"""By path: its dialect, its fields, and an order that is taken."""

NUMBERS = st.integers() | st.floats() | st.integers(10**18, 10**320) | st.sampled_from([0, 1, 2, 64, 128])
WORDS = st.text(st.characters(), max_size=20) | st.sampled_from([PICTURE, "auto", "64x64", "Euler a", "shapes", "png"])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def bodies(fields: tuple[str, ...], taken: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Orders that are taken but for a few fields, and anything at all."""
    names = st.sampled_from(fields) | st.text(st.characters(), max_size=8)
    changed = st.dictionaries(names, VALUES, max_size=3)
    return st.one_of(changed.map(lambda fields: taken | fields), changed, VALUES)


def hold(path: str, speaking: Speaking, examples: int) -> None:
    dialect, fields, taken = ROUTES[path]

    @settings(max_examples=examples, deadline=None, database=None, derandomize=examples == FEW)
    @given(body=bodies(fields, taken))
    def each(body: Any) -> None:
        before = speaking.orders()
        answer = speaking.send(
            "POST", path, content=json.dumps(body).encode(), headers={"content-type": "application/json"}
        )
        if answer.is_success:
            return
        assert answer.status_code in (404, 422), answer.text
        message, param = dialect.told(answer)
        assert param, answer.text
        assert message.isprintable(), message
        assert speaking.orders() == before

    each()


@pytest.mark.parametrize("path", ROUTES)
def test_no_json_breaks_a_dialect(path: str, speaking: Speaking) -> None:
    hold(path, speaking, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("path", ROUTES)
def test_no_json_breaks_a_dialect_at_length(path: str, speaking: Speaking) -> None:
    hold(path, speaking, MANY)


@pytest.mark.parametrize("path", ROUTES)
def test_what_is_taken_is_taken(path: str, speaking: Speaking) -> None:
    """So that the others change what is good."""
    assert speaking.send("POST", path, json=ROUTES[path][2]).is_success
