"""What a prompt says, whichever syntax it was written in: frozen trees, which `grammar`, `compel_syntax` and
`structured` build, `written` puts back into text, and `timeline` reads.

A whole prompt (`Prompt`) is a run of words, or a construct over whole prompts. Words never hold a whole prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class When:
    """A moment of the denoising: a share of the steps, or a step (the number of steps made before it)."""

    value: float
    share: bool = False

    def step(self, num_inference_steps: int) -> int:
        """The first step that lies behind the moment. A1111 rounds a share down, and so does this."""
        return int(self.value * num_inference_steps) if self.share else int(self.value)


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, without any syntax left in it."""

    text: str


@dataclass(frozen=True, slots=True)
class Concept:
    """`<name>`: vectors that were learned by textual inversion stand in the place of tokens."""

    name: str


@dataclass(frozen=True, slots=True)
class Weighted:
    """The words inside weigh `factor` times 1.1 to the power of `steps`; nested ones multiply."""

    words: Words
    factor: float = 1.0
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Break:
    """`BREAK`: what follows begins a new row of a CLIP."""


@dataclass(frozen=True, slots=True)
class Switch:
    """`[before:after:when]`: the one, and from that step on the other."""

    before: Words
    after: Words
    when: When


@dataclass(frozen=True, slots=True)
class Ramp:
    """`[before:after:begin-end]`: from the one to the other, in equal parts from step to step."""

    before: Words
    after: Words
    begin: When
    end: When


@dataclass(frozen=True, slots=True)
class Alternate:
    """`[a|b]`: another of them at each step, in turns."""

    options: tuple[Words, ...]


Word: TypeAlias = Text | Concept | Weighted | Break | Switch | Ramp | Alternate
Words: TypeAlias = tuple[Word, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A whole prompt and its weight among others."""

    prompt: Prompt
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Blend:
    """`("a", "b").blend(0.7, 0.3)`: the weighted sum of embeddings. `normalize` divides the weights by their sum."""

    parts: tuple[Part, ...]
    normalize: bool = True


@dataclass(frozen=True, slots=True)
class Conjunction:
    """`("a", "b").and()`: the embeddings below one another, as Compel has it."""

    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Composition:
    """`a AND b :0.5`: a noise prediction for each, w_i times its difference from the negative one's added up
    (Liu et al. 2022, https://arxiv.org/abs/2206.01714). Only as the outermost construct."""

    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """From `begin` until before `end` the prompt is `prompt`; with `ramp` it goes there in equal parts from what it was
    before, and stays."""

    begin: When
    end: When
    prompt: Prompt
    ramp: bool = False


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`("base", "a").schedule(10-20)`: `base` wherever no entry says otherwise. Entries rise and don't overlap."""

    base: Prompt
    entries: tuple[Entry, ...]


Prompt: TypeAlias = Words | Blend | Conjunction | Composition | Scheduled
