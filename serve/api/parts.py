"""What routes share: the service, the path that the server is mounted under, ids."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Request

from serve.service import ImageService


def _service(request: Request) -> ImageService:
    service: ImageService = request.app.state.service
    return service


def _root(request: Request) -> str:
    root: str = request.scope.get("root_path", "")
    return root.rstrip("/")


Service = Annotated[ImageService, Depends(_service)]
Root = Annotated[str, Depends(_root)]
JobId = Annotated[str, Path(alias="id", pattern=r"^[0-9a-f]{32}$")]
ImageIndex = Annotated[int, Path(ge=0, le=9999)]
