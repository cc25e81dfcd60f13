"""The native dialect as a plain HTTP client speaks it, to the picture."""

import io

import httpx
import numpy as np
from PIL import Image
from support.drawing import Drawing

from serve.shapes.captions import held_out_prompts
from serve.shapes.judge import agrees, read


def test_pictures_are_what_was_asked_for(drawing: Drawing) -> None:
    right = 0
    for prompt, scene in held_out_prompts(3):
        order = {"prompt": prompt, "seed": 3, "num_inference_steps": 20}
        job = httpx.post(f"{drawing.url}/v1/jobs?wait=true", json=order, timeout=60).json()
        assert job["state"] == "succeeded"
        file = httpx.get(drawing.url + job["images"][0]["url"]).content
        right += agrees(read(np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))), scene).ok
    assert right >= 2


def test_keys_are_asked_for_in_every_dialect(drawing_with) -> None:  # type: ignore[no-untyped-def]
    with drawing_with(keys={"required": True}, worker=False) as server:
        for path in ("/v1/models", "/sdapi/v1/options", "/internal/progress", "/generate", "/status/x", "/outputs/x"):
            assert httpx.get(server.url + path).status_code == 401
        bearer = {"authorization": f"Bearer {server.key()}"}
        assert httpx.get(f"{server.url}/v1/models", headers=bearer).status_code == 200
