"""One tree for one meaning, for trees that no parser built.

Words: as `serve.prompts.building` has it. An alternation has two options or more, and so has a composition, whose parts
have no blanks at their ends.
"""

from __future__ import annotations

from dataclasses import replace

from serve.prompts.ast import (
    Alternate,
    Blend,
    Composition,
    Conjunction,
    Part,
    Prompt,
    Ramp,
    Scheduled,
    Switch,
    Text,
    Weighted,
    Word,
    Words,
)
from serve.prompts.building import WordsBuilder, trimmed


def normal(prompt: Prompt) -> Prompt:
    """`prompt` in normal form, which is what `parse` gives: `parse(written(p)) == normal(p)`.

    The only part of a composition becomes the prompt, whatever its weight.
    """
    match prompt:
        case Blend(parts, normalize):
            return Blend(_parts(parts), normalize)
        case Conjunction(parts):
            return Conjunction(_parts(parts))
        case Composition(parts):
            if len(parts) == 1:
                return normal(parts[0].prompt)
            return Composition(tuple(_trimmed(part) for part in _parts(parts)))
        case Scheduled(base, entries):
            inner = tuple(replace(entry, prompt=normal(entry.prompt)) for entry in entries)
            return Scheduled(normal(base), inner)
        case _:
            return normal_words(prompt)


def normal_words(words: Words) -> Words:
    builder = WordsBuilder()
    _add(builder, words, 1.0, 0)
    return builder.finish()


def _add(builder: WordsBuilder, words: Words, factor: float, steps: int) -> None:
    for word in words:
        match word:
            case Text(text):
                builder.text(text, factor, steps)
            case Weighted(inner, own, power):
                _add(builder, inner, factor * own, steps + power)
            case Alternate(options) if len(options) < 2:
                for only in options:
                    _add(builder, only, factor, steps)
            case _:
                builder.word(_inside(word), factor, steps)


def _inside(word: Word) -> Word:
    match word:
        case Switch(before, after) | Ramp(before, after):
            return replace(word, before=normal_words(before), after=normal_words(after))
        case Alternate(options):
            return Alternate(tuple(map(normal_words, options)))
        case _:
            return word


def _parts(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(Part(normal(part.prompt), part.weight) for part in parts)


def _trimmed(part: Part) -> Part:
    return Part(trimmed(part.prompt), part.weight) if isinstance(part.prompt, tuple) else part
