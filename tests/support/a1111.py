"""`webuiapi`, unmodified, on a server of ours; and a replica's part played by a test, on a server without a worker."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import webuiapi
from numpy.typing import NDArray
from PIL import Image
from support.drawing import Drawing
from support.jobs import ANY, BROKEN

from serve.domain.jobs import ImageRef, JobState, Preview, Timings
from serve.jobs.store import Claim
from serve.results.store import open_store

WITHIN_S = 30.0


def api_of(server: Drawing, key: str | None = None) -> Any:
    """`key` is sent as the client sends a password."""
    return webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1", username=key and "anybody", password=key, steps=4)


def pixels(image: Image.Image) -> NDArray[np.int64]:
    """(h, w, 3)."""
    return np.asarray(image.convert("RGB")).astype(np.int64)


def beside(work: Callable[..., Any], **arguments: Any) -> Future[Any]:
    """The call in a thread of its own: it waits for what the test does meanwhile."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work(**arguments))
        except BaseException as error:  # noqa: BLE001 -- the test hears of it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def until(condition: Callable[[], Any]) -> Any:
    """What it answers once that is true; each question is a request to another thread."""
    deadline = time.monotonic() + WITHIN_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition never came true"
    return found


@dataclass(frozen=True)
class Replica:
    """Claims jobs of a server without a worker, and does with them what the test says."""

    server: Drawing

    def claim(self) -> Claim:
        """The job that comes first, once there is one."""
        found = until(lambda: self.server.run(self.server.jobs.claim("by hand", ANY)))
        assert isinstance(found, Claim)
        return found

    def step(self, claim: Claim, steps: int) -> None:
        self.server.run(self.server.jobs.renew(claim, steps))

    def show(self, claim: Claim, step: int, data: bytes) -> None:
        preview = Preview(claim.job_id, 0, step, claim.request.num_inference_steps, data)
        self.server.run(self.server.jobs.preview(claim, preview))

    def finish(self, claim: Claim) -> None:
        """Every picture of the job is a grey one."""
        self.server.run(self._finish(claim))

    def let_go(self, claim: Claim) -> JobState:
        """What a worker does when it hears that the job is cancelled. The state that it ends in."""
        self.server.run(self.server.jobs.cancelled(claim))
        return self.server.run(self.server.jobs.get(claim.job_id)).state

    async def fail(self, claim: Claim) -> None:
        """For good."""
        await self.server.jobs.fail(claim, BROKEN, retry=False)

    async def _finish(self, claim: Claim) -> None:
        request, file = claim.request, io.BytesIO()
        Image.new("RGB", (request.width, request.height), (128, 128, 128)).save(file, "PNG")
        store, refs = open_store(self.server.settings.results, self.server.settings.data_dir), []
        for index in range(request.num_images):
            key = f"{claim.job_id}/{index}.png"
            await store.put(key, file.getvalue(), "image/png")
            refs.append(
                ImageRef(
                    index=index,
                    key=key,
                    seed=request.seed_of(index),
                    width=request.width,
                    height=request.height,
                    content_type="image/png",
                    bytes=len(file.getvalue()),
                )
            )
        await self.server.jobs.succeed(claim, images=refs, cache={}, timings=Timings())
