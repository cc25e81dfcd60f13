"""FastAPI and the pipeline behind a lock: one image at a time, the others wait for their turn."""

from __future__ import annotations

import asyncio

import uvicorn
from fastapi import FastAPI, HTTPException, Response
from fastapi.concurrency import run_in_threadpool

from loadtest.baselines.common import Drawer, png
from loadtest.baselines.order import RETRY_AFTER, Order, options


def create_app(drawer: Drawer, max_waiting: int) -> FastAPI:
    app = FastAPI(title="One at a time")
    turn = asyncio.Lock()  # first come, first served; a thread's lock isn't
    waiting = 0

    @app.post("/generate")
    async def generate(order: Order) -> Response:
        nonlocal waiting
        if turn.locked() and waiting >= max_waiting:
            raise HTTPException(503, "the line is full", RETRY_AFTER)
        waiting += 1
        try:
            await turn.acquire()
        finally:
            waiting -= 1
        try:
            image = await run_in_threadpool(_draw, drawer, order)
        finally:
            turn.release()
        return Response(image, media_type="image/png")

    return app


def _draw(drawer: Drawer, order: Order) -> bytes:
    return png(drawer.draw([order])[0])


def main() -> None:
    arguments = options(__doc__).parse_args()
    app = create_app(Drawer(arguments.model, arguments.torch_threads), arguments.max_waiting)
    # Told to end, it doesn't draw the whole line first.
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning", timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main()
