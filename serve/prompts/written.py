r"""A prompt's tree -> text in A1111's syntax that says the same: `parse(written(prompt)) == normal(prompt)`.

What is text is escaped only where it would be read as more: a colon inside brackets, a bar inside square ones. Braces
always are, so that the text is no template. `A\ND` and `B\REAK` are the words; a backslash that escapes nothing is
dropped by the parser, as A1111 does.
"""

from __future__ import annotations

import enum
import re
from decimal import Decimal

from serve.prompts.ast import (
    Alternate,
    Blend,
    Break,
    Composition,
    Concept,
    Conjunction,
    Entry,
    Part,
    Prompt,
    Ramp,
    Scheduled,
    Switch,
    Text,
    When,
    Word,
    Words,
)
from serve.prompts.calls import UNNORMALIZED
from serve.prompts.normal import normal

_WORDS = r"\b(?:AND|BREAK)\b"
_SPECIAL = re.compile(rf"{_WORDS}|[\\()\[\]{{}}]|<(?=[\w-])")
_SPECIAL_IN_ROUND = re.compile(rf"{_WORDS}|[\\()\[\]{{}}:]|<(?=[\w-])")
_SPECIAL_IN_SQUARE = re.compile(rf"{_WORDS}|[\\()\[\]{{}}:|]|<(?=[\w-])")
_LIKE_A_CALL = re.compile(r'\s*\(\s*(?=")')
_IN_QUOTES = re.compile(r'\\(?P<escaped>["\\])|\\.|(?P<quote>")|(?P<last>\\)\Z', re.DOTALL)


class _Around(enum.Enum):
    """What a text stands in says what has to be escaped in it."""

    NOTHING = _SPECIAL
    ROUND = _SPECIAL_IN_ROUND
    """Or a part of a composition, where a number behind a colon is a weight too."""
    SQUARE = _SPECIAL_IN_SQUARE


def written(prompt: Prompt) -> str:
    """Raises ValueError for what has no text: a construct of no parts."""
    return _prompt(normal(prompt))


def when(moment: When) -> str:
    """`0.5` or `1.0` for a share, `10` for a step."""
    text = number(moment.value)
    return f"{text}.0" if moment.share and "." not in text else text


def number(value: float) -> str:
    """The shortest digits that make the same number, without an exponent."""
    text = repr(float(value))
    if "e" in text:
        text = format(Decimal(text), "f")
    return text.removesuffix(".0")


def _prompt(prompt: Prompt) -> str:
    match prompt:
        case Blend(parts, normalize):
            weights = [number(part.weight) for part in parts]
            return _call("blend", _quoted(parts), weights if normalize else [*weights, UNNORMALIZED])
        case Conjunction(parts):
            plain = all(part.weight == 1.0 for part in parts)
            return _call("and", _quoted(parts), [] if plain else [number(part.weight) for part in parts])
        case Composition(parts):
            return " AND ".join(map(_composed, parts))
        case Scheduled(base, entries):
            prompts = [_in_quotes(base), *(_in_quotes(entry.prompt) for entry in entries)]
            return _call("schedule", prompts, list(map(_range, entries)))
        case _:
            return _unlike_a_call(_words(prompt, _Around.NOTHING))


def _composed(part: Part) -> str:
    if isinstance(part.prompt, tuple):
        text = _unlike_a_call(_words(part.prompt, _Around.ROUND))
    else:
        text = _prompt(part.prompt)
    return text if part.weight == 1.0 else f"{text} :{number(part.weight)}"


def _call(name: str, prompts: list[str], arguments: list[str]) -> str:
    if not prompts:
        raise ValueError(f".{name}() of nothing")
    return f"({', '.join(prompts)}).{name}({', '.join(arguments)})"


def _quoted(parts: tuple[Part, ...]) -> list[str]:
    return [_in_quotes(part.prompt) for part in parts]


def _in_quotes(prompt: Prompt) -> str:
    """Backslashes that can stay single do, so that what they escape is escaped for the templates too."""
    return f'"{_IN_QUOTES.sub(_escaped_in_quotes, _prompt(prompt))}"'


def _escaped_in_quotes(match: re.Match[str]) -> str:
    if match["escaped"] is not None:
        return rf"\\\{match['escaped']}"
    return r"\"" if match["quote"] is not None else r"\\" if match["last"] is not None else match.group()


def _range(entry: Entry) -> str:
    return f"{when(entry.begin)}{'~' if entry.ramp else '-'}{when(entry.end)}"


def _unlike_a_call(text: str) -> str:
    """Words that begin like `("a", "b").blend()` but are none."""
    begin = _LIKE_A_CALL.match(text)
    return text if begin is None else f"{begin.group()}\\{text[begin.end() :]}"


def _words(words: Words, around: _Around) -> str:
    return "".join(_word(word, around) for word in words)


def _word(word: Word, around: _Around) -> str:
    match word:
        case Text(text):
            return around.value.sub(_escaped, text)
        case Concept(name):
            return f"<{name}>"
        case Break():
            return " BREAK "
        case Switch(before, after, moment):
            return f"[{_change(before, after)}:{when(moment)}]"
        case Ramp(before, after, begin, end):
            return f"[{_change(before, after)}:{when(begin)}-{when(end)}]"
        case Alternate(options):
            return f"[{'|'.join(_words(option, _Around.SQUARE) for option in options)}]"
        case _:
            return _weighted(word.words, word.factor, word.steps, around)


def _weighted(words: Words, factor: float, steps: int, around: _Around) -> str:
    inside = _Around.SQUARE if steps < 0 or around is _Around.SQUARE else _Around.ROUND
    text = _words(words, inside)
    if factor != 1.0:
        text = f"({text}:{number(factor)})"
    return f"{'(' * steps}{text}{')' * steps}" if steps >= 0 else f"{'[' * -steps}{text}{']' * -steps}"


def _change(before: Words, after: Words) -> str:
    if after and not before:
        return _words(after, _Around.SQUARE)
    return f"{_words(before, _Around.SQUARE)}:{_words(after, _Around.SQUARE)}"


def _escaped(match: re.Match[str]) -> str:
    found = match.group()
    return f"{found[0]}\\{found[1:]}" if len(found) > 1 else f"\\{found}"
