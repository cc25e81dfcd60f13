"""Words to order pictures in: captions of scenes that the shipped model can draw, repeated as people repeat them."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate

import numpy as np

from loadtest.workload import Fixed, Prompts, Texts, Zipf
from serve.shapes.captions import caption
from serve.shapes.draw import sample_scene

_TRIES = 8
"""Captions that came before, before another scene makes the text longer."""


class Wording:
    """Pairs of a prompt and a negative prompt, one request after another; the seed fixes them all.

    Owns: what was said so far. The two sides draw from random numbers of their own: how one repeats does not change
    the other.
    """

    def __init__(self, prompts: Prompts, seed: int) -> None:
        self._positive = _source(prompts.positive, f"positive/{seed}")
        self._negative = _source(prompts.negative, f"negative/{seed}")
        self._empty = prompts.empty_negative
        self._rng = random.Random(f"empty/{seed}")

    def next(self) -> tuple[str, str]:
        return self._positive(), "" if self._rng.random() < self._empty else self._negative()


def _source(texts: Texts, seed: str) -> Callable[[], str]:
    new = _Captions(texts.scenes, seed)
    if isinstance(texts, Fixed):
        text = new.next() if texts.text is None else texts.text
        return lambda: text
    if isinstance(texts, Zipf):
        known = [new.next() for _ in range(texts.texts)]
        likely = list(accumulate(rank**-texts.a for rank in range(1, texts.texts + 1)))
        rng = random.Random(f"zipf/{seed}")
        return lambda: rng.choices(known, cum_weights=likely)[0]
    return new.next


class _Captions:
    """Different texts of `scenes` captions each. Owns: those that it gave."""

    def __init__(self, scenes: int, seed: str) -> None:
        self._scenes = scenes
        self._rng = random.Random(f"captions/{seed}")
        self._scene_rng = np.random.default_rng(self._rng.getrandbits(63))
        self._given: set[str] = set()

    def next(self) -> str:
        """A text that was not given before."""
        scenes = self._scenes
        while True:
            for _ in range(_TRIES):
                text = ", ".join(self._caption() for _ in range(scenes))
                if text not in self._given:
                    self._given.add(text)
                    return text
            scenes += 1

    def _caption(self) -> str:
        return caption(sample_scene(self._scene_rng), self._rng, complete=True)
