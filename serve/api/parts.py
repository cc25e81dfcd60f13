"""What routes share: the services, the path that the server is mounted under, ids, what may stand in a query.

What FastAPI depends on is a coroutine here, however short: it sends a plain function through its thread pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Path, Request
from fastapi.dependencies.models import Dependant

from serve.api.auth import KEYED
from serve.api.streams import Streams
from serve.captions.service import CaptionService
from serve.errors import InvalidRequest
from serve.service import ImageService
from serve.settings.orders import LimitSettings
from serve.telemetry.logs import escape
from serve.text import TextService


async def _service(request: Request) -> ImageService:
    service: ImageService = request.app.state.service
    return service


async def _text(request: Request) -> TextService:
    text: TextService = request.app.state.text
    return text


async def _captions(request: Request) -> CaptionService | None:
    captions: CaptionService | None = request.app.state.captions
    return captions


async def _root(request: Request) -> str:
    root: str = request.scope.get("root_path", "")
    return root.rstrip("/")


async def _streams(request: Request) -> Streams:
    streams: Streams = request.app.state.streams
    return streams


async def _limits(request: Request) -> LimitSettings:
    limits: LimitSettings = request.app.state.limits
    return limits


async def _known_query(request: Request) -> None:
    """Refuses a query parameter that the route does not have: with a misspelt `dry_run` an order would be queued."""
    known = set(_queried(request.scope["route"].dependant))
    for name in request.query_params:
        if name not in known:
            told = ", ".join(sorted(known)) or "none"
            raise InvalidRequest(f"{escape(name)[:100]}: no such query parameter here; there are: {told}", name)


def _queried(dependant: Dependant) -> Iterator[str]:
    """The query parameters of a route and of all that it depends on."""
    yield from (field.alias for field in dependant.query_params)
    for other in dependant.dependencies:
        yield from _queried(other)


GUARDED = (*KEYED, Depends(_known_query))
"""What every route under `/v1` depends on."""

Service = Annotated[ImageService, Depends(_service)]
Text = Annotated[TextService, Depends(_text)]
Captions = Annotated[CaptionService | None, Depends(_captions)]
"""None where no model describes pictures."""
OpenStreams = Annotated[Streams, Depends(_streams)]
Root = Annotated[str, Depends(_root)]
Limits = Annotated[LimitSettings, Depends(_limits)]
JobId = Annotated[str, Path(alias="id", pattern=r"^[0-9a-f]{32}$")]
ImageName = Annotated[str, Path(alias="index", pattern=r"^([0-9]{1,4}|image|mask)$")]
