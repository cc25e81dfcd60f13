"""Models are held by the classes that they are planned for, and take what was predicted."""

import pytest
import torch

from serve.bench.gpu import CASES, LADDERS
from serve.bench.gpu_memory import Held, empty_card, measure_held
from serve.bench.gpu_report import WANTED_ERROR
from serve.devices import CLASS_SLACK, Card
from serve.memory.classes import BUILT_IN
from serve.memory.planner import plan
from serve.memory.shapes import published
from serve.rungs import LADDER, MEANS, Rung


def held(model: str, gpu_class: str, side: int, card: Card, device: torch.device, rung: Rung | None = None) -> Held:
    """Measured in a process that may take what the class's plan says."""
    gpu, shape = BUILT_IN[gpu_class], published()[model]
    if CLASS_SLACK * gpu.memory_bytes > card.memory_bytes:
        pytest.skip(f"the card has {card.memory_bytes / 1e9:.1f} GB")
    best, worst = (rung, rung) if rung else (Rung.RESIDENT, Rung.SEQUENTIAL_OFFLOAD)
    made = plan(shape, gpu.memory_bytes, gpu.dtypes, width=side, height=side, best=best, worst=worst)
    if rung is not None and not made.fits:
        pytest.skip(f"{model} is not planned on {rung} here")
    return measure_held(shape, made, gpu_class, device)


def check(found: Held) -> None:
    assert found.trouble == ""
    assert found.relief == (), "nothing had to be given up while images were drawn"
    assert found.peak <= found.reserved <= found.cap
    assert found.peak <= (1 + WANTED_ERROR) * found.peak_predicted
    errors = {phase.phase: round(phase.error, 3) for phase in found.phases}
    assert all(abs(error) <= WANTED_ERROR for error in errors.values()), errors


@pytest.mark.parametrize(("model", "gpu_class", "side"), CASES)
def test_a_class_holds_what_it_is_planned_to_hold(
    cuda: torch.device, card: Card, model: str, gpu_class: str, side: int
) -> None:
    check(held(model, gpu_class, side, card, cuda))


@pytest.mark.parametrize("rung", [rung for rung in LADDER if MEANS[rung].on_card])
@pytest.mark.parametrize(("model", "gpu_class", "side"), LADDERS)
def test_a_rung_takes_what_it_is_predicted_to_take(
    cuda: torch.device, card: Card, model: str, gpu_class: str, side: int, rung: Rung
) -> None:
    check(held(model, gpu_class, side, card, cuda, rung))


def test_nothing_of_a_stream_that_has_ended_counts_against_the_next_cap(cuda: torch.device) -> None:
    """cuBLAS keeps a workspace of megabytes for each stream that multiplied."""
    empty_card()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            square = torch.ones(256, 256, device=cuda, dtype=torch.float16)
            square @ square
        torch.cuda.synchronize()
        del square
    empty_card()
    assert torch.cuda.memory_allocated() == before
