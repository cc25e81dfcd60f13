"""A server on loopback that speaks the native API from a script, and misbehaves on demand as a real one can't."""

import asyncio
import io
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.cli.app import main

STEPS = 4
JOB_ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Script:
    """What the server does. `url` is where it listens.

    A job's events are numbered from 1: `STEPS` steps, then the end. `cut` holds how many events each connection lets
    through before it breaks (the last entry repeats); `hang` keeps a job running for ever.

    The answers to the first `lost` orders break off, and then the refusal `after_loss` is all that the server says; an
    order that comes again under its key is not taken twice. With a `key`, who does not send it is refused. `places` are
    the job's places in the queue, one for each time that somebody looks, before it starts.

    A text is refused if it is "bad", and `busy` texts are answered 503 before the first is encoded. `most_at_once` is
    how many were on their way together. `found` is what there is to say of prompts, to both who ask.
    """

    url: str = ""
    cut: list[int] = field(default_factory=lambda: [99])
    streams: bool = True
    hang: bool = False
    end: str = "succeeded"
    refusal: Response | None = None
    pools: dict[str, Any] = field(default_factory=lambda: {"diffusion": {"ready": True, "detail": ""}})
    orders: list[dict[str, Any]] = field(default_factory=list)
    resumed_after: list[str | None] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    following: threading.Event = field(default_factory=threading.Event)
    seen: int = 0
    lost: int = 0
    after_loss: Response | None = None
    idempotency_keys: list[str | None] = field(default_factory=list)
    key: str | None = None
    shown_keys: set[str | None] = field(default_factory=set)
    places: list[int] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    texts: list[dict[str, Any]] = field(default_factory=list)
    busy: int = 0
    at_once: int = 0
    most_at_once: int = 0
    cache: dict[str, Any] = field(default_factory=dict)
    cleared: int = 0
    analyses: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def job(self) -> dict[str, Any]:
        ended = self.seen > STEPS
        order = self.orders[-1]
        place = self.places[0] if self.places else None
        return {
            "id": JOB_ID,
            "state": "queued" if place else self._state(ended),
            "step": min(self.seen, STEPS),
            "steps": STEPS,
            "position": place,
            "eta_s": place and 4.0 * place,
            "request": order | {"model": "shapes", "seed": order.get("seed", 5)},
            "timings": {"total_s": 1.5 if ended else None},
            "cache": {"memory": 1, "redis": 0, "encoded": 1},
            "truncated": [{"field": "prompt", "encoder": "clip-l", "tokens": 80, "limit": 75, "text": " and more"}],
            "images": self._images(order) if self.end == "succeeded" else [],
            "error": None if self.end == "succeeded" else {"code": "out_of_memory", "message": "not enough memory"},
        }

    def _state(self, ended: bool) -> str:
        return "cancelled" if self.cancelled.is_set() else self.end if ended else "running"

    def _images(self, order: dict[str, Any]) -> list[dict[str, Any]]:
        kind = f"image/{order.get('output_format', 'png')}"
        same = {"width": 8, "height": 8, "bytes": 70, "content_type": kind}
        return [
            {"index": index, "url": f"/v1/images/{JOB_ID}/{index}", "seed": 5 + index} | same
            for index in range(order.get("num_images", 1))
        ]

    async def create(self, request: Request) -> Response:
        if self.refusal is not None:
            return self.refusal
        if self._unknown(request):
            return error(401, "this server wants an API key", None)
        order, key = await request.json(), request.headers.get("idempotency-key")
        if key is None or key not in self.idempotency_keys:
            self.orders.append(order)
        self.idempotency_keys.append(key)
        if self.lost:
            self.lost -= 1
            self.refusal = self.after_loss
            return BrokenOff()
        return JSONResponse(self.job(), 202)

    def _unknown(self, request: Request) -> bool:
        shown = request.headers.get("authorization")
        self.shown_keys.add(shown)
        return self.key is not None and shown != f"Bearer {self.key}"

    async def get(self, request: Request) -> Response:
        if self.refusal is not None:
            return self.refusal
        if self._unknown(request):
            return error(401, "this server wants an API key", None)
        if not self.streams and not self.hang:
            self.seen += 1
        self.places = self.places[1:]
        if not self.places:
            self.started.set()
        return JSONResponse(self.job())

    async def cancel(self, request: Request) -> Response:
        self.cancelled.set()
        return JSONResponse(self.job())

    async def events(self, request: Request) -> Response:
        after = request.headers.get("last-event-id")
        self.resumed_after.append(after)
        self._unknown(request)
        if not self.streams or self.refusal is not None:
            return self.refusal or JSONResponse({"detail": "a proxy that lets no stream pass"}, 502)
        let_through = self.cut.pop(0) if len(self.cut) > 1 else self.cut[0]
        return StreamingResponse(self._events(int(after or 0), let_through), media_type="text/event-stream")

    async def _events(self, after: int, let_through: int) -> AsyncIterator[str]:
        yield ": hello\n\n"
        self.following.set()
        if self.places:
            await asyncio.to_thread(self.started.wait, 10)
        for number in range(after + 1, STEPS + 2)[:let_through]:
            self.seen = max(self.seen, number)
            state = self.end if number > STEPS else "running"
            data = f'{{"state": "{state}",\ndata: "step": {min(number, STEPS)}, "steps": {STEPS}}}'
            yield f"id: {number}\nevent: step\ndata: {data}\n\n"
        if self.hang:
            await asyncio.to_thread(self.cancelled.wait, 10)

    async def image(self, request: Request) -> Response:
        if self._unknown(request):
            return error(401, "this server wants an API key", None)
        if "stored" not in request.query_params:
            return RedirectResponse(f"{request.url.path}?stored=1")
        file = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")

    async def embed(self, request: Request) -> Response:
        if self._unknown(request):
            return error(401, "this server wants an API key", None)
        if self.refusal is not None:
            return self.refusal
        if self.busy:
            self.busy -= 1
            return error(503, "the text-encoder pool does not answer", None, **{"Retry-After": "0"})
        order = await request.json()
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        if order["prompt"] == "bad":
            return error(422, "clip_skip must be between 0 and 1", "clip_skip")
        known = order in self.texts
        self.texts.append(order)
        cut = (
            [{"field": "prompt", "encoder": "e", "tokens": 80, "limit": 75, "text": "x"}]
            if "cut" in order["prompt"]
            else []
        )
        cache = {"memory": int(known), "redis": 0, "encoded": int(not known)}
        return JSONResponse({"model": "shapes", "family": "sd", "cache": cache, "truncated": cut})

    async def analyze(self, request: Request) -> Response:
        self.analyses.append(await request.json())
        return self.refusal or JSONResponse(self.found)

    async def compare(self, request: Request) -> Response:
        self.comparisons.append(await request.json())
        return self.refusal or JSONResponse(self.found)

    async def cache_state(self, request: Request) -> Response:
        if self._unknown(request):
            return error(401, "this server wants an API key", None)
        return self.refusal or JSONResponse(self.cache)

    async def clear(self, request: Request) -> Response:
        self.cleared += 1
        return self.refusal or JSONResponse({"removed": 1234})

    async def ready(self, request: Request) -> Response:
        ready = all(pool["ready"] for pool in self.pools.values())
        return JSONResponse({"ready": ready, "pools": self.pools}, 200 if ready else 503)


class BrokenOff(Response):
    """The connection ends in the middle of the answer."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 202, "headers": [(b"content-length", b"999")]})


def error(status: int, message: str, param: str | None, **headers: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x", "param": param, "code": "x"}}, status, headers)


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    app = Starlette(
        routes=[
            Route("/v1/jobs", script.create, methods=["POST"]),
            Route("/v1/jobs/{id}", script.get),
            Route("/v1/jobs/{id}", script.cancel, methods=["DELETE"]),
            Route("/v1/jobs/{id}/events", script.events),
            Route("/v1/images/{id}/{index}", script.image),
            Route("/v1/embeddings", script.embed, methods=["POST"]),
            Route("/v1/prompts/analyze", script.analyze, methods=["POST"]),
            Route("/v1/prompts/similarity", script.compare, methods=["POST"]),
            Route("/v1/cache", script.cache_state),
            Route("/v1/cache", script.clear, methods=["DELETE"]),
            Route("/readyz", script.ready),
        ]
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # so that whoever connects too early waits
        script.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield script
        server.should_exit = True
        thread.join()


@pytest.fixture
def tandem(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command with these arguments, here, and returns its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["tandem", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    return run


@pytest.fixture
def nowhere() -> Iterator[str]:
    """A URL at which nothing listens: the port is held, so that nothing else takes it."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"
