"""When an order reached the application, and its span where orders are traced."""

from __future__ import annotations

import time

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.domain.orders import Arrival
from serve.telemetry.tracing import OrderSpan, Tracing

_ARRIVAL = "tandem.arrival"
_ORDERS = ("POST", "PUT")


class Arrivals:
    """Notes the time before anything of the request is read. With `tracing`, every request that may order something has
    a span until its answer has gone out, or nobody waits for it any more."""

    def __init__(self, app: ASGIApp, tracing: Tracing | None = None) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in _ORDERS:
            return await self._app(scope, receive, send)
        at = time.monotonic()
        if self._tracing is None:
            scope[_ARRIVAL] = Arrival(at=at)
            return await self._app(scope, receive, send)
        span = self._tracing.order(Headers(scope=scope).get("traceparent"))
        scope[_ARRIVAL] = Arrival(at=at, trace=span.traceparent)
        return await self._traced(span, scope, receive, send)

    async def _traced(self, span: OrderSpan, scope: Scope, receive: Receive, send: Send) -> None:
        status, job_id, broken = 0, "", False

        async def watched(message: Message) -> None:
            nonlocal status, job_id
            if message["type"] == "http.response.start":
                status = message["status"]
                job_id = Headers(raw=message["headers"]).get("location", "").rpartition("/v1/jobs/")[2]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            broken = True
            raise
        finally:
            route = getattr(scope.get("route"), "path", "")
            told: dict[str, str | int | float] = {"http.request.method": scope["method"]}
            told |= {"http.route": route} if route else {}
            told |= {"http.response.status_code": status} if status else {}
            told |= {"tandem.job": job_id} if job_id else {}
            span.end(f"{scope['method']} {route}".strip(), told, failed=broken or status >= 500)


def arrival_of(request: Request) -> Arrival | None:
    """None of a request that orders nothing."""
    arrival: Arrival | None = request.scope.get(_ARRIVAL)
    return arrival
