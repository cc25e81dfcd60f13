"""Ray Serve, the whole pipeline in one deployment: `@serve.batch` collects what is drawn together, as far as it is
equal."""

# Without `from __future__ import annotations`: FastAPI reads the types of a handler inside a function.

import logging
import os
import signal
import tempfile
import threading
from argparse import Namespace

import ray
from fastapi import FastAPI, Response
from ray import serve

from loadtest.baselines.order import Order, batch_options


def application(
    model: str, torch_threads: int | None, *, batch: int, batch_wait_s: float, max_waiting: int
) -> serve.Application:
    app = FastAPI(title="Ray Serve with batches")

    @serve.deployment(
        max_ongoing_requests=2 * batch,  # a batch that is drawn, and the next one
        max_queued_requests=max(1, max_waiting - batch),
        ray_actor_options={"num_cpus": 1},
    )
    @serve.ingress(app)
    class Generator:
        def __init__(self) -> None:
            from loadtest.baselines.common import Drawer, png  # in the replica alone: no other process needs torch

            self._drawer, self._png = Drawer(model, torch_threads), png

        # It computes on the replica's event loop, as Ray's examples do. A thread would make smaller batches: Serve
        # would cut the next one while this one is drawn, `batch_wait_s` after its first order.
        @serve.batch(max_batch_size=batch, batch_wait_timeout_s=batch_wait_s)  # type: ignore[untyped-decorator]
        async def draw(self, orders: list[Order]) -> list[bytes]:
            return [self._png(image) for image in self._drawer.draw(orders)]

        @app.post("/generate")
        async def generate(self, order: Order) -> Response:
            return Response(await self.draw(order), media_type="image/png")

    bound: serve.Application = Generator.bind()  # type: ignore[attr-defined]
    return bound


def main() -> None:
    arguments = batch_options(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        _serve(arguments, folder)


def _serve(arguments: Namespace, folder: str) -> None:
    """Until it is told to stop; Ray's files are in the folder."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # as Tandem's; else whoever sends the load goes first
    ended = threading.Event()
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, 2),
        include_dashboard=False,
        logging_level=logging.WARNING,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    quiet = {"log_level": "WARNING"}
    serve.start(http_options={"host": "127.0.0.1", "port": arguments.port}, logging_config=quiet)
    serve.run(
        application(
            arguments.model,
            arguments.torch_threads,
            batch=arguments.batch,
            batch_wait_s=arguments.batch_wait_s,
            max_waiting=arguments.max_waiting,
        ),
        logging_config=quiet,
    )
    ended.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
