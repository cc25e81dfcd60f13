"""The process of the bare engine: the same model, settings and cores as the server's, and nothing around it.

Text is encoded beforehand; no PNG, no store, no Redis, no HTTP. Its threads are not nice, where those of a replica on a
CPU are. Saturated, it draws when no server is up. One order at a time, it draws beside the idle server, in pairs with
the server's own orders: what that idle server takes of the cores falls on both sides.

Orders come as JSON, a line each, on the standard input, and answers go to the standard output; the end of the input
ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from loadtest.bench.bare import Drawn
from serve.bench.conditionings import encode_orders
from serve.catalog import open_catalog
from serve.diffusion.engine import Engine, Rendered, Work
from serve.diffusion.profile import open_profile
from serve.diffusion.runner import open_runner
from serve.diffusion.scheduler import StepScheduler
from serve.domain.jobs import StepEvent
from serve.domain.orders import ImageRequest
from serve.errors import OperatorError
from serve.origins import load_args
from serve.placements import plan_placements
from serve.telemetry.metrics import InProcessMetrics

_STOP_S = 10.0
_DECODES = 3


class _Here:
    """What the process itself does. Owns: the engine."""

    def __init__(self, settings: Mapping[str, Any], cores: Sequence[int], prompts: Sequence[str]) -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        tree = load_args(settings, environ={}).settings
        catalog = open_catalog(tree)
        place = plan_placements(tree, catalog.drawn)[0]
        model = catalog.drawn[place.model]
        own = place.settings.model_copy(update={"max_pixels": place.max_pixels})
        texts = encode_orders(model, _samples(model.name, prompts), tree.data_dir)
        self._texts = {(order.prompt, order.guided): text for order, text in texts.items()}
        runner = open_runner(model, own)
        self._factor = runner.family.vae.scale_factor
        self._profile = open_profile(runner, model, own, tree.data_dir)
        self._engine = Engine(runner, StepScheduler(self._profile), self._profile, InProcessMetrics())
        self._runs = 0
        _name_threads()

    def do(self, what: Mapping[str, Any]) -> Any:
        if "draw" in what:
            return [asdict(self._draw(ImageRequest(**what["draw"])))]
        if "saturate" in what:
            orders = [ImageRequest(**order) for order in what["saturate"]]
            return [asdict(one) for one in asyncio.run(self._saturate(orders, what["users"], what["in_hand"]))]
        return self._weigh([ImageRequest(**order) for order in what["weigh"]])

    def _submit(self, order: ImageRequest) -> Future[Rendered]:
        self._runs += 1
        text = self._texts[order.prompt, order.guided]
        return self._engine.submit(Work(f"bare-{self._runs}", order, text), _ignore)

    def _draw(self, order: ImageRequest) -> Drawn:
        sent_s = time.monotonic()
        rendered = self._submit(order).result()
        return Drawn(index=0, sent_s=sent_s, ended_s=time.monotonic(), stages=_stages(rendered))

    async def _saturate(self, orders: Sequence[ImageRequest], users: int, in_hand: int) -> list[Drawn]:
        line = iter(enumerate(orders))
        places, done = asyncio.Semaphore(in_hand), list[Drawn]()

        async def user() -> None:
            for index, order in line:
                sent_s = time.monotonic()
                async with places:
                    rendered = await asyncio.wrap_future(self._submit(order))
                done.append(
                    Drawn(index=index, sent_s=sent_s, ended_s=time.monotonic(), stages=_stages(rendered)),
                )

        async with asyncio.TaskGroup() as group:
            for _ in range(users):
                group.create_task(user())
        return done

    def _weigh(self, orders: Sequence[ImageRequest]) -> list[float]:
        decode_s = {}
        for size in dict.fromkeys((order.width, order.height) for order in orders):
            sample = next(order for order in orders if (order.width, order.height) == size)
            decode_s[size] = median(self._submit(sample).result().spent.vae_s for _ in range(_DECODES))
        weights = []
        for order in orders:
            shape = (order.height // self._factor, order.width // self._factor)
            cap = self._profile.lanes(shape)
            step_s = self._profile.step_ms(shape, cap) / 1000 / cap * order.lanes
            weights.append(order.num_inference_steps * step_s + decode_s[order.width, order.height])
        return weights

    def stop(self) -> None:
        self._engine.stop(_STOP_S)


def _samples(model: str, prompts: Sequence[str]) -> list[ImageRequest]:
    """An order for every text that is to be encoded, with guidance and without."""
    common = {"model": model, "width": 64, "height": 64, "num_inference_steps": 1, "seed": 0}
    return [
        ImageRequest(prompt=prompt, guidance_scale=scale, **common)  # type: ignore[arg-type]
        for prompt in dict.fromkeys(prompts)
        for scale in (1.0, 2.0)
    ]


def _stages(rendered: Rendered) -> dict[str, float]:
    """Those that a job's `timings` have too."""
    spent = rendered.spent
    return {
        "batch": spent.batch_s,
        "steps": spent.steps_s,
        "decode_wait": spent.decode_wait_s,
        "decode": spent.decode_s,
    }


def _name_threads() -> None:
    """In the kernel too: what torch starts from one of them inherits the name (loadtest.processes.thread_seconds)."""
    for thread in threading.enumerate():
        if thread.name in ("engine", "vae"):
            with contextlib.suppress(OSError):
                Path(f"/proc/self/task/{thread.native_id}/comm").write_text(thread.name)


def _ignore(event: StepEvent) -> None:
    pass


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    here: _Here | None = None
    for line in sys.stdin:
        what = json.loads(line)
        try:
            if here is None:
                here = _Here(what["settings"], what["cores"], what["prompts"])
                told: Any = "ready"
            else:
                told = here.do(what)
        except OperatorError as error:
            sys.exit(error.message)
        print(json.dumps(told), file=answers, flush=True)
    if here is not None:
        here.stop()


if __name__ == "__main__":
    main()
