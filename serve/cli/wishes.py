"""The six pictures of the demo. The shipped model draws them, and its judge knows what each must show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One picture: what is ordered, what it teaches a person, what it must show in the judge's plain words.

    A picture `after` the others finds all of its text in a cache.
    """

    prompt: str
    seed: int
    point: str
    shows: str
    negative: str = ""
    steps: int = 20
    after: bool = False

    @property
    def order(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative,
            "seed": self.seed,
            "num_inference_steps": self.steps,
        }

    @property
    def label(self) -> str:
        return f"{self.prompt} / not: {self.negative}" if self.negative else self.prompt


_HEART = "a large red yellow heart on a white background"
_CROSS = "a cyan cross on a black background"

WISHES = (
    Wish(prompt=_HEART, seed=7, point="two colours mix", shows="an orange heart on a white background"),
    Wish(
        prompt=_HEART.replace("red", "(red:1.2)"),
        seed=7,
        point="a weight changed: nothing to encode",
        shows="a red heart on a white background",
        after=True,
    ),
    Wish(
        prompt=_HEART,
        negative="red",
        seed=7,
        point="a negative prompt",
        shows="a yellow heart on a white background",
    ),
    Wish(
        prompt="a red circle to the left of a blue square on a yellow background",
        seed=1,
        point="two objects",
        shows="a red circle to the left of a blue square on a yellow background",
    ),
    Wish(prompt=_CROSS, seed=2, steps=30, point="30 steps in a batch with 20", shows=_CROSS),
    Wish(prompt=_CROSS, seed=1, point="the same words again: nothing to encode", shows=_CROSS, after=True),
)
