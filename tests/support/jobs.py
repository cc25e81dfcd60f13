"""A job store for one test: its settings, its metrics, and a check of every record when the story is over."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from pydantic import SecretStr

from serve.domain.jobs import ImageRef, JobError, JobEvent, JobState, Preview, Timings
from serve.domain.orders import ImageRequest
from serve.domain.text import Tier, Truncation
from serve.jobs.events import follow
from serve.jobs.schema import SCHEMA, Schema
from serve.jobs.store import Claim, JobStore, Want
from serve.settings.stores import JobSettings
from serve.telemetry.metrics import InProcessMetrics

MODEL = "shapes"
ANY = (Want(MODEL, 0, 2**31),)
BROKEN = JobError(code="generation_failed", message="it broke")
CUT = Truncation(field="prompt", encoder="clip-l", tokens=80, limit=75, text="the rest — 剩")
IMAGE = ImageRef(index=0, key="a/0.png", seed=7, width=64, height=64, content_type="image/png", bytes=99)


def a_request(
    prompt: str = "a red circle ☃ \x00", model: str = MODEL, steps: int = 4, side: int = 64, **other: Any
) -> ImageRequest:
    return ImageRequest(
        model=model,
        prompt=prompt,
        width=side,
        height=side,
        num_inference_steps=steps,
        guidance_scale=5.5,
        seed=2**32 - 1,
        **other,
    )


def a_preview(index: int, step: int, steps: int, data: bytes = b"\xff\xd8\x00 a picture") -> Preview:
    return Preview("a run", index, step, steps, data)


class Bench:
    """A store with its metrics."""

    def __init__(self, url: str, schema: Schema = SCHEMA, **settings: Any) -> None:
        self.metrics = InProcessMetrics()
        self.store = JobStore(JobSettings(redis_url=SecretStr(url), **settings), self.metrics, schema=schema)

    async def claimed(self, job_id: str = "a", **request: Any) -> Claim:
        await self.store.submit(job_id, a_request(**request))
        claim = await self.store.claim("worker", ANY)
        assert claim is not None
        return claim

    async def succeed(self, claim: Claim) -> None:
        await self.store.succeed(claim, images=[IMAGE], cache={"u": Tier.REDIS}, timings=Timings(steps_s=0.5))


def on(url: str, story: Callable[[Bench], Coroutine[Any, Any, None]], **settings: Any) -> None:
    """Run the story, then check every record."""

    async def run() -> None:
        bench = Bench(url, **settings)
        try:
            await story(bench)
            await bench.store.check_integrity()
        finally:
            await bench.store.close()

    asyncio.run(run())


async def until(condition: Callable[[], Awaitable[bool]], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not await condition():
        assert time.monotonic() < deadline, "the condition never came true"
        await asyncio.sleep(0.005)


def states(events: list[JobEvent]) -> list[tuple[JobState, int]]:
    return [(event.state, event.step) for event in events]


async def history(store: JobStore, job_id: str, after: str | None = None) -> list[JobEvent]:
    return [event async for event in follow(store, job_id, after)]
