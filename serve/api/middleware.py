"""What every request passes: a request id, the bounds on its body, and the last resort when something breaks."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import internal_error, respond_to
from serve.errors import PayloadTooLarge, Unavailable

log = logging.getLogger(__name__)

_BODY = "tandem.body"
_RETRY_AFTER_S = 1.0
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
            await internal_error(scope)(scope, receive, labelled)


class BodyLimit:
    """Refuses a body over `max_bytes` with 413, and with 503 one that would take the bodies that this process holds
    over `max_bodies_bytes`: before any of it is read where Content-Length says so.

    A body counts as it arrives, so that nobody holds room by announcing one, until its request is answered or the
    route has let go of it (`release_body`).
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_bodies_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.room = _Room(max_bodies_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        too_large = PayloadTooLarge(f"the body is over {self.max_bytes} bytes", "body")
        full = Unavailable("the server holds as many bodies as it may", "body", _RETRY_AFTER_S)
        announced = Headers(scope=scope).get("content-length", "")
        # Twenty digits decide; Python would refuse to read thousands of them.
        size = int(announced[:20]) if announced.isdecimal() else 0
        if size > self.max_bytes:
            return await respond_to(too_large, scope)(scope, receive, send)
        if size > self.room.left:
            return await respond_to(full, scope)(scope, receive, send)
        body = scope[_BODY] = _Body(self.room)

        async def bounded() -> Message:
            message = await receive()
            # An HTTPException, because FastAPI turns any other error of reading a body into a 400.
            body.size += len(message.get("body", b""))
            if body.size > self.max_bytes:
                raise HTTPException(413) from too_large
            if not body.take():
                raise HTTPException(503) from full
            return message

        try:
            return await self.app(scope, bounded, send)
        finally:
            body.release()


class _Room:
    """Bytes that are left for bodies."""

    def __init__(self, left: int) -> None:
        self.left = left


class _Body:
    """One request's. `size` bytes of it have come.

    Owns: what it took of the room.
    """

    def __init__(self, room: _Room) -> None:
        self.size = 0
        self._room = room
        self._taken = 0

    def take(self) -> bool:
        """Room for what has come; False where there is none."""
        more = self.size - self._taken
        if more > self._room.left:
            return False
        self._room.left -= more
        self._taken = self.size
        return True

    def release(self) -> None:
        self._room.left += self._taken
        self.size = self._taken = 0


def release_body(request: Request) -> None:
    """For a route whose answer takes long: nothing holds the body any more once the route has returned.

    The request keeps what was read of it, bytes and JSON, for whoever asks again, and FastAPI keeps the request.
    """
    for kept in ("_body", "_json"):
        vars(request).pop(kept, None)
    request.scope[_BODY].release()
