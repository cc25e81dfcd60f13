"""What routes share: the services, the path that the server is mounted under, the tenant, ids."""

from __future__ import annotations

import hashlib
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


def _tenant(request: Request) -> str:
    """The salt of the caller's cache entries: 16 hex digits, or none where no tenant is named.

    A header that came twice counts as a tenant of its own, so that a client whose proxy appends instead of replacing
    can't pass for another.
    """
    header = request.app.state.salt_header
    name = ",".join(request.headers.getlist(header)) if header else ""
    return hashlib.blake2b(name.encode(), digest_size=8).hexdigest() if name else ""


def _root(request: Request) -> str:
    root: str = request.scope.get("root_path", "")
    return root.rstrip("/")


Service = Annotated[ImageService, Depends(_service)]
Text = Annotated[TextService, Depends(_text)]
Tenant = Annotated[str, Depends(_tenant)]
Root = Annotated[str, Depends(_root)]
JobId = Annotated[str, Path(alias="id", pattern=r"^[0-9a-f]{32}$")]
ImageName = Annotated[str, Path(alias="index", pattern=r"^([0-9]{1,4}|image|mask)$")]
