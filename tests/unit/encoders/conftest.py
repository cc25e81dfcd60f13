from collections.abc import Callable

import pytest

from serve.domain import EncodeUnit, ImageRequest
from serve.encoders.forward import TextTower
from serve.models import SHIPPED
from serve.prompts.plan import Planner, PromptPlan
from serve.prompts.tokenizers import PromptTokenizer

Plan = Callable[..., PromptPlan]


@pytest.fixture(scope="session")
def tower() -> TextTower:
    """The shipped model's text encoder. Its counters only ever grow: compare differences."""
    return TextTower.load(SHIPPED, "cpu", "float32")


@pytest.fixture(scope="session")
def plan(tower: TextTower) -> Plan:
    planner = Planner(PromptTokenizer(SHIPPED), tower.fingerprint)

    def plan(prompt: str, negative: str = "") -> PromptPlan:
        return planner.plan(
            ImageRequest(
                model="shapes",
                prompt=prompt,
                negative_prompt=negative,
                width=128,
                height=128,
                num_inference_steps=1,
                guidance_scale=5.0,
                seed=0,
            )
        )

    return plan


@pytest.fixture(scope="session")
def units(plan: Plan) -> list[EncodeUnit]:
    """A hundred different rows."""
    words = ("red", "blue", "green", "circle", "star", "on", "a", "the", "left", "two")
    return [plan(f"{first} {second}").positive.units[0] for first in words for second in words]
