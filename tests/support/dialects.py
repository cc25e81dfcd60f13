"""The same order in each dialect, and what each makes of a refusal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from support.speaking import Speaking

LONGEST = 1500
"""Bytes of a refusal, whatever was sent."""
SOON_S = 2.0
Words = Mapping[str, str | Callable[[Any], dict[str, Any]]]


@dataclass(frozen=True)
class Dialect:
    """Where an order goes, and how its fields are written: `words` has the dialect's name of a native field, or what
    makes fields of its value. `picture` is where an order goes that starts from an image."""

    name: str
    path: str
    words: Words
    picture: str = ""
    always: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    """What a refusal calls a native field, where `words` does not say it."""

    def can(self, *fields: str) -> bool:
        return all(name in self.words for name in fields)

    def order(self, **native: Any) -> tuple[str, bytes]:
        """Path and body."""
        body = dict(self.always)
        for name, value in native.items():
            word = self.words[name]
            body |= {word: value} if isinstance(word, str) else word(value)
        path = self.picture if "image" in native or "mask" in native else self.path
        return path, json.dumps(body).encode()

    def param(self, native: str) -> str:
        word = self.words[native]
        return self.params[native] if native in self.params else str(word)

    def told(self, answer: httpx.Response) -> tuple[str, str | None]:
        """Message and field of a refusal, whose shape must be the dialect's."""
        body = answer.json()
        if self.name == "a1111":
            assert set(body) == {"error", "detail", "body", "errors", "param"}, body
            assert body["errors"] == body["detail"]
            assert body["body"] == ""
            return body["detail"], body["param"]
        if self.name == "imagen":
            assert set(body) == {"detail", "param"}, body
            return body["detail"], body["param"]
        assert set(body) == {"error"}, body
        error = body["error"]
        assert set(error) == {"message", "type", "param", "code"}, body
        return error["message"], error["param"]


_SAME = ("prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "seed", "num_images")

NATIVE = Dialect(
    "native",
    "/v1/jobs",
    {name: name for name in (*_SAME, "image", "mask", "strength", "model")}
    | {"size": lambda value: {"width": value[0], "height": value[1]}},
    picture="/v1/jobs",
)
OPENAI = Dialect(
    "openai",
    "/v1/images/generations",
    {name: name for name in ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "model")}
    | {
        "num_images": "n",
        "width": lambda value: {"size": f"{value}x128"},
        "height": lambda value: {"size": f"128x{value}"},
        "size": lambda value: {"size": f"{value[0]}x{value[1]}"},
        "image": lambda value: {"images": [{"image_url": value}]},
        "mask": lambda value: {"mask": {"image_url": value}},
        "strength": "strength",
    },
    picture="/v1/images/edits",
    params={"width": "size", "height": "size", "image": "images", "mask": "mask"},
)
A1111 = Dialect(
    "a1111",
    "/sdapi/v1/txt2img",
    {
        "prompt": "prompt",
        "negative_prompt": "negative_prompt",
        "width": "width",
        "height": "height",
        "size": lambda value: {"width": value[0], "height": value[1]},
        "num_inference_steps": "steps",
        "guidance_scale": "cfg_scale",
        "seed": "seed",
        "num_images": "batch_size",
        "image": lambda value: {"init_images": [value]},
        "mask": "mask",
        "strength": "denoising_strength",
        "model": lambda value: {"override_settings": {"sd_model_checkpoint": value}},
    },
    picture="/sdapi/v1/img2img",
    params={"image": "init_images", "model": "override_settings.sd_model_checkpoint"},
)
IMAGEN = Dialect("imagen", "/generate", {"prompt": "prompt", "negative_prompt": "negative_prompt"})

DIALECTS = (NATIVE, OPENAI, A1111, IMAGEN)


def refused(speaking: Speaking, dialect: Dialect, status: int, path: str, **content: Any) -> tuple[str, str | None]:
    """Message and field of what must be refused with this status."""
    before, began = speaking.orders(), time.perf_counter()
    answer = speaking.send("POST", path, **content)
    assert time.perf_counter() - began < SOON_S
    assert answer.status_code == status, answer.text
    assert len(answer.content) < LONGEST
    assert answer.headers["x-request-id"]
    assert speaking.orders() == before
    message, param = dialect.told(answer)
    assert message.isprintable(), message
    return message, param
