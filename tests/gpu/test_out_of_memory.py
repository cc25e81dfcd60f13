"""Memory that runs out for real, at a step and at the decoding: the images are drawn all the same, and the replica
says on which rung."""

from functools import partial

import pytest
import torch

from serve.bench.gpu_memory import capped
from serve.bench.random_models import random_family, random_work, size_of
from serve.diffusion.engine import Engine
from serve.diffusion.ladder import Ladder
from serve.diffusion.profile import Profile
from serve.diffusion.run import Rendered
from serve.diffusion.rungs import descend
from serve.diffusion.runner import Runner
from serve.diffusion.scheduler import StepScheduler
from serve.domain.jobs import Relief
from serve.memory.planner import plan
from serve.memory.shapes import published
from serve.rungs import Rung, worse
from serve.telemetry.metrics import InProcessMetrics

SD15 = published()["sd15"]


def drawn(
    device: torch.device, budget: int, size: tuple[int, int], images: int
) -> tuple[list[Rendered], list[Relief], Engine]:
    """The images of a replica that began with everything on the card, then had no more than `budget` of it."""
    family = random_family(SD15, device, torch.float16, Rung.RESIDENT)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(budget / torch.cuda.get_device_properties(device).total_memory)
    runner, profile, told = Runner(family), Profile(images), list[Relief]()
    ladder = Ladder(family.rung, Rung.SEQUENTIAL_OFFLOAD, partial(descend, family))
    engine = Engine(runner, StepScheduler(profile), profile, InProcessMetrics(), 0, ladder)
    works = [random_work(runner, SD15, size, seed, 3) for seed in range(images)]
    futures = [engine.submit(work, lambda event: None, None, told.append) for work in works]
    try:
        return [future.result(timeout=600) for future in futures], told, engine
    finally:
        engine.stop()


def need(width: int, rung: Rung = Rung.RESIDENT) -> int:
    """Bytes of one image of a square size, planned on a rung."""
    return plan(SD15, 80e9, ("float16",), width=width, height=width, best=rung, worst=rung).footprint.peak


def test_a_batch_that_is_too_large_is_stepped_in_parts(cuda: torch.device) -> None:
    with capped(cuda, None):
        pictures, told, engine = drawn(cuda, need(512) + 2**28, size_of(SD15), 8)
    assert len(pictures) == 8
    assert {relief.measure for relief in told if relief.phase == "step"} >= {"fewer_images"}
    assert engine.rung is Rung.RESIDENT


@pytest.mark.parametrize("part", ["step", "decode"])
def test_what_no_measure_above_helps_goes_down_the_ladder(cuda: torch.device, part: str) -> None:
    """Less than the weights and a step together: weights must be packed or leave; less than a whole decoding beside the
    steps: it is made between two, in tiles."""
    made = plan(SD15, 80e9, ("float16",), width=512, height=512).footprint
    budget = made.weights + (made.step // 3 if part == "step" else made.step)
    with capped(cuda, None):
        pictures, told, engine = drawn(cuda, budget, size_of(SD15), 2)
    assert len(pictures) == 2
    assert {relief.phase for relief in told} & {part, "begin"}
    if part == "step":
        assert worse(engine.rung, than=Rung.RESIDENT)
        assert {picture.rung for picture in pictures} == {engine.rung}


def test_the_replica_draws_on_after_an_image_that_nothing_holds(cuda: torch.device) -> None:
    """Of two images, one is far too large for the memory: it fails, the other one is drawn."""
    family = random_family(SD15, cuda, torch.float16, Rung.RESIDENT)
    runner, profile = Runner(family), Profile(2)
    engine = Engine(runner, StepScheduler(profile), profile, InProcessMetrics())
    total = torch.cuda.get_device_properties(cuda).total_memory
    torch.cuda.set_per_process_memory_fraction((need(512) + 2**28) / total)
    try:
        large = engine.submit(random_work(runner, SD15, (2048, 2048), 0, 2), lambda event: None)
        small = engine.submit(random_work(runner, SD15, (512, 512), 1, 2), lambda event: None)
        assert large.exception(timeout=600) is not None
        assert len(small.result(timeout=600).images) == 1
        assert (
            len(engine.submit(random_work(runner, SD15, (512, 512), 2, 2), lambda event: None).result(600).images) == 1
        )
    finally:
        engine.stop()
