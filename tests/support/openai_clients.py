"""OpenAI's own client, unmodified, on a server of ours; and the pictures that it gets."""

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openai import OpenAI
from openai.types import Image as Answered
from openai.types import ImagesResponse
from PIL import Image
from support.drawing import Drawing

Pixels = NDArray[np.uint8]


def client_of(server: Drawing, key: str = "none", **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=60, **options)


def the_one(answer: ImagesResponse) -> Answered:
    assert answer.data
    assert len(answer.data) == 1
    return answer.data[0]


def file_of(answer: ImagesResponse) -> bytes:
    return base64.b64decode(the_one(answer).b64_json or "")


def pixels(data: str | bytes | None) -> Pixels:
    """(h, w, 3) of a file, or of one in base64."""
    assert data
    file = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
