"""What it takes for Serve to carry an ASGI application."""

from __future__ import annotations

from fastapi import FastAPI
from ray.exceptions import RayError
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def carried(app: FastAPI) -> FastAPI:
    """The application with what it takes to be carried by Serve."""
    app.add_middleware(LeaveRequestId)
    app.add_middleware(HangUps)  # the outermost: all that receives is to hear of them
    return app


class LeaveRequestId:
    """Serve's proxy gives every request its id and every answer the same `x-request-id`; a second one would be ours."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def once(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self._app(scope, receive, once)


class HangUps:
    """A client who hangs up is told of as ASGI has it. Serve lets an exception out of `receive` where its own question
    to the proxy was cancelled with the request, or the proxy is gone: either way nobody is left to be answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = False

        async def heard() -> Message:
            nonlocal gone
            if not gone:
                try:
                    return await receive()
                except RayError:
                    gone = True  # Serve says nothing more, and who asks again would wait for ever
            return {"type": "http.disconnect"}

        await self._app(scope, heard if scope["type"] == "http" else receive, send)
