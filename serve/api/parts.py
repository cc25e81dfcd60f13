"""What routes share: the services, the path that the server is mounted under, ids."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Request

from serve.service import ImageService
from serve.text import TextService


def _service(request: Request) -> ImageService:
    service: ImageService = request.app.state.service
    return service


def _text(request: Request) -> TextService:
    text: TextService = request.app.state.text
    return text


def _root(request: Request) -> str:
    root: str = request.scope.get("root_path", "")
    return root.rstrip("/")


Service = Annotated[ImageService, Depends(_service)]
Text = Annotated[TextService, Depends(_text)]
Root = Annotated[str, Depends(_root)]
JobId = Annotated[str, Path(alias="id", pattern=r"^[0-9a-f]{32}$")]
ImageName = Annotated[str, Path(alias="index", pattern=r"^([0-9]{1,4}|image|mask)$")]
