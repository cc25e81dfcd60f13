"""The simulation beside the server itself: real job store, worker, step loop and result store around a device whose
steps and decodings take the time that is written here. What is left to be wrong is the simulation."""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.house import House, open_house, parts

from loadtest.bench.calibration_fit import Compared, compared, fleet_of, overheads, paced
from loadtest.samples import Arrival, Outcome, Sample
from serve.diffusion.runner import Latents, Runner
from serve.diffusion.scheduler import Row
from serve.jobs.store import Terms
from serve.stages import STAGES

STEP_MS, LANE_MS = 60.0, 8.0
"""Of a step, and of each lane of 128 x 128 pixels in it."""
DECODE_MS = 40.0
SIDES, STEPS = (64, 128, 128), (4, 8, 12, 16)
RATE, ORDERS = 2.4, 90
OFF_BY = 0.15


class Clockwork(Runner):
    """Computes nothing and takes its time."""

    def step(self, rows: Sequence[Row], most: int | None = None) -> dict[Row, Exception]:
        lanes = sum(row.lanes for row in rows)
        height, width = rows[0].group.shape
        time.sleep((STEP_MS + LANE_MS * lanes * height * width / 256) / 1000)
        return {}

    def decode(self, latents: Latents, side: int | None = None) -> Image.Image:
        height, width = (8 * each for each in latents.tensor.shape[-2:])
        time.sleep(DECODE_MS * height * width / 128**2 / 1000)
        return Image.new("RGB", (width, height))


def arrivals(rate: float, count: int, seed: int) -> list[Arrival]:
    rng, now, found = random.Random(seed), 0.0, []
    for index in range(count):
        now += rng.expovariate(rate)
        side = rng.choice(SIDES)
        body = {"width": side, "height": side, "num_inference_steps": rng.choice(STEPS), "scheduler": "ddim"}
        body |= {"guidance_scale": rng.choice((1.0, 7.0, 7.0)), "seed": index}
        found.append(Arrival(index=index, due_s=now, dialect="wait", body=body))
    return found


async def drawn(house: House, arrival: Arrival, prefix: str, began: float) -> Sample:
    await asyncio.sleep(max(0.0, began + arrival.due_s - time.monotonic()))
    job_id = f"{prefix}{arrival.index}"
    await house.jobs.submit(job_id, house.a_request(**arrival.body), terms=Terms(owner="o"))
    job = await house.ended(job_id, 120.0)
    ended_s = time.monotonic() - began
    timings = {f"{name}_s": getattr(job.timings, f"{name}_s") for name in STAGES}
    return Sample(
        index=arrival.index,
        dialect="wait",
        due_s=arrival.due_s,
        sent_s=arrival.due_s,
        ended_s=ended_s,
        outcome=Outcome.DONE,
        status=200,
        job={"timings": timings, "request": arrival.body},
    )


async def sent(house: House, sending: Sequence[Arrival], prefix: str) -> list[Sample]:
    began = time.monotonic()
    return list(await asyncio.gather(*(drawn(house, each, prefix, began) for each in sending)))


def told(found: Compared) -> Mapping[str, Any]:
    return {"measured": found.measured_s, "simulated": found.simulated_s, "errors": found.errors}


@pytest.mark.slow
@pytest.mark.anyio
async def test_the_simulation_is_within_a_few_percent_of_the_server(redis_url: str, tmp_path: Path) -> None:
    async with (
        open_house(redis_url, tmp_path, lease_s=30.0, max_queued=1000, max_queued_s=1e6) as house,
        house.worker(runner=Clockwork(parts().runner.family)),
    ):
        others = arrivals(RATE, 40, 1)
        learned = await sent(house, others, "learn")
        sending = arrivals(RATE, ORDERS, 2)
        samples = await sent(house, sending, "measure")
        (report,) = (await house.jobs.crew(house.model.name)).reports
    fleet = fleet_of(report, overheads(learned), "shapes")
    shape = fleet.shape("here")
    fleet, _ = paced(fleet, shape, others, learned)
    found = compared(fleet, shape, sending, samples, 0.7, sending[-1].due_s)
    print(told(found))  # docs/simulate.md has them
    assert all(abs(error) <= OFF_BY for error in found.errors.values()), told(found)
