"""What every request passes: a request id, the bound on its body, and the last resort when something breaks."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import internal_error, respond_to
from serve.errors import PayloadTooLarge

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestIds:
    """Labels each answer with `x-request-id`: the client's own where it sent a decent one, else a new one.

    An exception that nobody handled ends here: logged under that id, answered 500 in our shape. Once an answer has
    begun, the exception goes on to the server, which then cuts the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        started = False

        async def labelled(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, labelled)
        except Exception:
            log.exception("unexpected error", extra={"request_id": request_id, "path": scope["path"]})
            if started:
                raise
            await internal_error()(scope, receive, labelled)


class BodyLimit:
    """Refuses a body over `max_bytes` with 413: before any of it is read where Content-Length says so."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        too_large = PayloadTooLarge(f"the body is over {self.max_bytes} bytes", "body")
        announced = Headers(scope=scope).get("content-length", "")
        # Twenty digits decide; Python would refuse to read thousands of them.
        if announced.isdecimal() and int(announced[:20]) > self.max_bytes:
            return await respond_to(too_large)(scope, receive, send)
        left = self.max_bytes

        async def bounded() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                # An HTTPException, because FastAPI turns any other error of reading a body into a 400.
                raise HTTPException(413) from too_large
            return message

        return await self.app(scope, bounded, send)
