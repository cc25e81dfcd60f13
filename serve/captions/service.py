"""The story of one caption, as the ingress tells it: check the order, read the picture, ask the pool."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from serve.callers import Caller
from serve.captions.messages import Ask, Caption
from serve.errors import ModelNotFound
from serve.orders import within
from serve.settings.orders import LimitSettings
from serve.settings.pools import CaptionSettings
from serve.telemetry.logs import escape
from serve.wording import check_length

MAX_SIDE = 2048
"""Pixels of the longer side that a model gets to see; larger pictures are made smaller first. No model that is known
looks at more of a side."""

ReadPicture = Callable[[str, str, str, int], Awaitable[bytes]]
"""(field, what stands in it, owner, most pixels of a side) -> an RGB PNG. `serve.inputs.Inputs.picture`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCaption:
    """A caption as a client orders it; None takes the default."""

    image: str
    prompt: str | None = None
    max_new_tokens: int | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Captioned:
    """What was said, by whom; `tokens` are those of the caption."""

    model: str
    caption: str
    tokens: int


class CaptionService:
    """Describes pictures with the one model of `captions.source`."""

    def __init__(
        self,
        model: str,
        settings: CaptionSettings,
        limits: LimitSettings,
        read: ReadPicture,
        ask: Callable[[Ask], Awaitable[Caption]],
    ) -> None:
        self.model = model
        self._settings = settings
        self._limits = limits
        self._read = read
        self._ask = ask

    async def caption(self, new: NewCaption, caller: Caller) -> Captioned:
        """Raises ModelNotFound; InvalidRequest, or JobNotFound for the picture of a job that there is not, naming the
        field; BackendUnavailable, GenerationFailed."""
        if new.model not in (None, self.model):
            raise ModelNotFound(f"model {escape(new.model or '')[:256]!r} makes no captions here", "model")
        prompt = new.prompt or ""
        check_length("prompt", prompt, self._limits)
        most = self._settings.max_new_tokens if new.max_new_tokens is None else new.max_new_tokens
        within("max_new_tokens", most, 1, self._settings.max_new_tokens)
        picture = await self._read("image", new.image, caller.owner, MAX_SIDE)
        told = await self._ask(Ask(picture, prompt, most, caller.salt))
        return Captioned(model=self.model, caption=told.text, tokens=told.tokens)
