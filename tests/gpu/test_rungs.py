"""Every rung draws, and what it draws is what the rung above draws, as far as its weights are the same."""

import pytest
import torch

from serve.bench.random_models import random_family
from serve.diffusion.rungs import descend
from serve.diffusion.synthetic import synthetic_lanes
from serve.memory.shapes import published
from serve.rungs import LADDER, MEANS, Rung

SHAPE = (64, 64)
ROUNDING = {"plain": 0.01, "int8": 0.05, "int4": 0.3}
"""Of a prediction's size, how far off a rung may be from the resident one, by its weights."""


def predicted(family: object) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = family.predict(synthetic_lanes(family, SHAPE, 2))  # type: ignore[attr-defined,arg-type]
    return out.float().cpu()


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize("model", ["sd15", "sd35-medium"])
def test_every_rung_predicts_what_the_resident_one_does(cuda: torch.device, model: str) -> None:
    """Opened on the rung, as a replica is that was planned there."""
    shape, dtype = published()[model], torch.float16
    known = predicted(random_family(shape, cuda, dtype, Rung.RESIDENT))
    for rung in (each for each in LADDER[1:] if MEANS[each].on_card):
        found = predicted(random_family(shape, cuda, dtype, rung))
        assert distance(found, known) < ROUNDING[MEANS[rung].weights], rung


def test_a_living_model_goes_down_every_rung(cuda: torch.device) -> None:
    """Without being opened again: what is on the card afterwards is less, and it still draws."""
    family = random_family(published()["sd15"], cuda, torch.float16, Rung.RESIDENT)
    known, before = predicted(family), torch.cuda.memory_allocated()
    for rung in LADDER[1:]:
        descend(family, rung)
        assert family.rung is rung
        assert distance(predicted(family), known) < ROUNDING[MEANS[rung].weights], rung
        assert torch.cuda.memory_allocated() <= before * 1.01, rung
    assert torch.cuda.memory_allocated() < 2**28, "on the CPU's rung nothing is left on the card"
