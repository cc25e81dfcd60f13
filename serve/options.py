"""A1111's options, so far as they mean something here, and its styles, which are this server's templates.

A1111 keeps one set for everybody; here each caller has one. An option that is not among these is passed over.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from serve.errors import InvalidRequest, ModelNotFound
from serve.prompts.templates import names
from serve.settings.orders import TemplateSettings

PROMPT = "{prompt}"
"""What stands in a style for the order's own prompt."""

_MODEL = "sd_model_checkpoint"
_HASH = re.compile(r" \[[0-9a-f]{6,64}\]")
_SUFFIXES = (".safetensors", ".ckpt")


@dataclass(frozen=True, slots=True)
class Options:
    """By A1111's names; what it says without being told.

    `sd_model_checkpoint` is the name of a model here, None the first one. `CLIP_stop_at_last_layers` is one more than
    our `clip_skip`. `samples_format` and `jpeg_quality` (of jpeg and webp) are those of the pictures in an answer.
    Previews come every `show_progress_every_n_steps` steps, if that is above 0 and `live_previews_enable`.
    """

    sd_model_checkpoint: str | None = None
    CLIP_stop_at_last_layers: int = 1
    samples_format: str = "png"
    jpeg_quality: int = 80
    show_progress_every_n_steps: int = 10
    live_previews_enable: bool = True


_DEFAULTS = Options()


@dataclass(frozen=True, slots=True)
class Style:
    """A prompt that is put around an order's own, where it has `{prompt}`, or behind it."""

    name: str
    prompt: str
    negative_prompt: str


def _spelled(value: Any) -> Any:
    return "jpeg" if value == "jpg" else value


class _Given(BaseModel):
    """What a client may set each of them to; null sets it back."""

    model_config = ConfigDict(extra="ignore")

    sd_model_checkpoint: str | None = Field(None, max_length=512)
    CLIP_stop_at_last_layers: int | None = Field(None, ge=1, le=12)
    samples_format: Annotated[Literal["png", "jpeg", "webp"] | None, BeforeValidator(_spelled)] = None
    jpeg_quality: int | None = Field(None, ge=1, le=100)
    show_progress_every_n_steps: int | None = Field(None, ge=-1, le=1000)
    live_previews_enable: bool | None = None


def read(given: Mapping[str, Any], models: Sequence[str], place: str = "") -> dict[str, Any]:
    """Those of `given` that there are, as they are kept. Raises InvalidRequest, or ModelNotFound for a model that is
    not among `models`, which name `place` and the option."""
    try:
        told = _Given.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = f"{place}{first['loc'][0]}"
        raise InvalidRequest(f"{param}: {first['msg']}", param) from None
    found = {name: getattr(told, name) for name in told.model_fields_set}
    if title := found.get(_MODEL):
        found[_MODEL] = model_named(title, models, f"{place}{_MODEL}")
    return {name: getattr(_DEFAULTS, name) if value in (None, "") else value for name, value in found.items()}


def changed(options: Options, given: Mapping[str, Any], models: Sequence[str], place: str = "") -> Options:
    """Over `options` what `given` says; see `read`."""
    return dataclasses.replace(options, **read(given, models, place))


def kept(values: Mapping[str, Any], models: Sequence[str]) -> Options:
    """What was kept of a caller's. A value that this server can't mean any more has its default: another version may
    have written it, or the model is gone."""
    options = Options()
    for name, value in values.items():
        try:
            options = changed(options, {name: value}, models)
        except (InvalidRequest, ModelNotFound):
            continue
    return options


def model_named(title: str, models: Sequence[str], param: str = _MODEL) -> str:
    """The model that a client means by a title, with or without a hash or the ending of a file. Raises ModelNotFound
    that names `param`."""
    bare = _HASH.sub("", title).strip()
    for name in (title, bare, *(bare.removesuffix(suffix) for suffix in _SUFFIXES)):
        if name in models:
            return name
    raise ModelNotFound(f"{param}: there is no such model; there are: {', '.join(models)}", param)


def styles_of(templates: Mapping[str, TemplateSettings]) -> dict[str, Style]:
    """By name, the templates in A1111's syntax that need nothing of an order but its prompt."""
    return {
        name: Style(name, each.text, each.negative_prompt or "")
        for name, each in templates.items()
        if each.text is not None
        and each.syntax == "a1111"
        and names(each.text) | names(each.negative_prompt or "") <= {PROMPT[1:-1]}
    }


def styled(prompt: str, negative_prompt: str, styles: Sequence[Style]) -> tuple[str, str]:
    """Both texts with the styles around them, one after another, by A1111's rule: a style without a place for the
    prompt follows it behind a comma."""
    for style in styles:
        prompt = _around(style.prompt, prompt)
        negative_prompt = _around(style.negative_prompt, negative_prompt)
    return prompt, negative_prompt


def _around(style: str, text: str) -> str:
    if PROMPT in style:
        return style.replace(PROMPT, text)
    return ", ".join(filter(None, (text.strip(), style.strip())))
