"""Words in normal form, whoever writes them: the same meaning is always the same tree.

In normal form no text is empty and no two stand side by side; no weight stands directly inside another, lies on nothing
or changes nothing, and neighbours of one weight share it; a `BREAK` has no weight, and no blanks around it.
"""

from __future__ import annotations

from serve.prompts.ast import Break, Text, Weighted, Word, Words

EMPHASIS = 1.1
"""Factor of one pair of A1111's round brackets; a pair of square ones divides by it."""
MOST_STEPS = 32
"""A power of EMPHASIS beyond it is multiplied out, so that it can be written with few brackets."""


def power(factor: float, steps: int) -> float:
    """The weight that `factor` and `steps` of a `Weighted` make. Never overflows: 1.1 ** 1000 is finite, and beyond it
    any factor that is in range makes a weight that is not."""
    return factor * EMPHASIS ** max(-1000, min(1000, steps)) if steps else factor


class WordsBuilder:
    """Takes words from left to right, each with its own weight."""

    def __init__(self) -> None:
        self._groups: list[tuple[float, int, list[Word]]] = []
        """Words by weight; neighbouring groups differ in it."""
        self._texts: list[str] = []
        """Text at the end of the last group that is no word of it yet."""
        self._broken = False
        """Nothing but blanks came since a Break."""

    def text(self, text: str, factor: float = 1.0, steps: int = 0) -> None:
        if self._broken:
            text = text.lstrip()
        if text:
            self._broken = False
            self._group(factor, steps)
            self._texts.append(text)

    def word(self, word: Word, factor: float = 1.0, steps: int = 0) -> None:
        """Any word but Text and Weighted."""
        if isinstance(word, Break):
            self._trim()
            factor, steps = 1.0, 0
        self._broken = isinstance(word, Break)
        words = self._group(factor, steps)
        self._flush()
        words.append(word)

    def finish(self) -> Words:
        self._flush()
        words: list[Word] = []
        for factor, steps, group in self._groups:
            if factor == 1.0 and not steps:
                words += group
            else:
                words.append(Weighted(tuple(group), factor, steps))
        return tuple(words)

    def _group(self, factor: float, steps: int) -> list[Word]:
        if abs(steps) > MOST_STEPS:
            factor, steps = power(factor, steps), 0
        if self._groups:
            last = self._groups[-1]
            if last[0] == factor and last[1] == steps:
                return last[2]
            self._flush()
        words: list[Word] = []
        self._groups.append((factor, steps, words))
        return words

    def _flush(self) -> None:
        if self._texts:
            self._groups[-1][2].append(Text("".join(self._texts)))
            self._texts.clear()

    def _trim(self) -> None:
        """Takes the blanks off the end."""
        self._flush()
        while self._groups:
            words = self._groups[-1][2]
            last = words[-1]
            if not isinstance(last, Text):
                return
            words.pop()
            if kept := last.text.rstrip():
                words.append(Text(kept))
                return
            if not words:
                self._groups.pop()


def trimmed(words: Words) -> Words:
    """Without the blanks at both ends, where they have no weight."""
    if words and isinstance(words[0], Text):
        first = words[0].text.lstrip()
        words = (Text(first), *words[1:]) if first else words[1:]
    if words and isinstance(words[-1], Text):
        last = words[-1].text.rstrip()
        words = (*words[:-1], Text(last)) if last else words[:-1]
    return words
