"""LitServe with dynamic batching: what waits when the worker is free is drawn together, as far as it is equal."""

# Without `from __future__ import annotations`: LitServe reads the types of `decode_request` and `encode_response`.

from typing import Any

import litserve
from fastapi import Response
from PIL import Image
from starlette.types import ASGIApp, Receive, Scope, Send

from loadtest.baselines.order import RETRY_AFTER, Order, batch_options

TIMEOUT_S = 600.0
"""Of an order that waits: Tandem's `jobs.queue_ttl_s`. LitServe's own 30 s would end orders that the others draw."""


class Generator(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, model: str, torch_threads: int | None, **batching: Any) -> None:
        super().__init__(api_path="/generate", **batching)
        self._model = model
        self._torch_threads = torch_threads

    def setup(self, device: str) -> None:
        from loadtest.baselines.common import Drawer  # in the worker alone: the other processes have no use for torch

        self._drawer = Drawer(self._model, self._torch_threads)

    def decode_request(self, request: Order) -> Order:
        return request

    def predict(self, orders: list[Order]) -> list[Image.Image]:
        return self._drawer.draw(orders)

    def encode_response(self, output: Image.Image) -> Response:
        from loadtest.baselines.common import png

        return Response(png(output), media_type="image/png")


class Bounded:
    """LitServe's own queue has no end: with `most` orders in the house, the next is refused."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self._here = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        if self._here >= self._most:
            refusal = Response("the line is full", status_code=503, headers=RETRY_AFTER)
            return await refusal(scope, receive, send)
        self._here += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._here -= 1


def main() -> None:
    arguments = batch_options(__doc__).parse_args()
    generator = Generator(
        arguments.model,
        arguments.torch_threads,
        max_batch_size=arguments.batch,
        batch_timeout=arguments.batch_wait_s,
    )
    server = litserve.LitServer(
        generator,
        accelerator="cpu",
        timeout=TIMEOUT_S,
        middlewares=[(Bounded, {"most": arguments.batch + arguments.max_waiting})],
    )
    server.run(
        host="127.0.0.1", port=arguments.port, num_api_servers=1, log_level="warning", generate_client_file=False
    )


if __name__ == "__main__":
    main()
