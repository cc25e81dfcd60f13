r"""`("a", "b").blend(0.7, 0.3)`: what puts whole prompts together, found and taken apart.

Its arguments are quoted; \" and \\ are the characters themselves, and any other backslash is the prompt's own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from serve.prompts.ast import Blend, Conjunction, Entry, Part, Prompt, Scheduled
from serve.prompts.places import MAX_PARTS, MAX_WEIGHT, MOMENT, Source, follows, moment, rises, weight

MAX_CALLS = 4
"""Calls inside one another."""
NAMES = ("blend", "and", "schedule")
UNNORMALIZED = "no_normalize"

_START = re.compile(r"\s*\(\s*(?=\")")
_STRING = re.compile(r'"(?P<text>[^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL)
_COMMA = re.compile(r"\s*,\s*(?=\")")
_NAME = re.compile(r"\s*\)\s*\.\s*(?P<name>[A-Za-z_]\w*)\s*\(")
_ESCAPE = re.compile(r'\\(["\\])')
_RANGE = re.compile(rf"(?P<begin>{MOMENT})\s*(?P<way>[-~])\s*(?P<end>{MOMENT})")


@dataclass(frozen=True, slots=True)
class Call:
    """`prompts` and `arguments` are its two brackets' contents; it stands in the text from `at` until before `end`."""

    name: str
    at: int
    end: int
    prompts: tuple[Source, ...]
    arguments: tuple[tuple[int, str], ...]
    """Each with its position; empty where the brackets are."""


def find_call(source: Source, at: int) -> Call | None:
    """The call that begins at `at`, blanks before it aside, or None. Raises InvalidRequest for one that has no end."""
    start = _START.match(source.text, at)
    if start is None:
        return None
    prompts: list[Source] = []
    here: re.Match[str] | None = start
    while here is not None:
        string = _STRING.match(source.text, here.end())
        if string is None:
            return None
        prompts.append(_unquoted(source, string))
        end = string.end()
        here = _COMMA.match(source.text, end)
    name = _NAME.match(source.text, end)
    if name is None:
        return None
    begin, end = name.end(), source.text.find(")", name.end())
    if end < 0:
        raise source.refuse(len(source.text), f".{name['name'][:20]}( is never closed")
    if len(prompts) > MAX_PARTS:
        raise source.refuse(prompts[MAX_PARTS].begin, f"more than {MAX_PARTS} prompts in one call")
    given = arguments(source.text[begin:end], begin)
    return Call(name["name"], name.start("name"), end + 1, tuple(prompts), given)


def arguments(text: str, at: int) -> tuple[tuple[int, str], ...]:
    """What stands between the commas of `text`, which itself stands at `at`, each with its position."""
    if not text.strip():
        return ()
    found = []
    for part in text.split(","):
        found.append((at + len(part) - len(part.lstrip()), part.strip()))
        at += len(part) + 1
    return tuple(found)


def made(call: Call, source: Source, prompts: tuple[Prompt, ...]) -> Prompt:
    """What the call makes of its prompts. Raises InvalidRequest that names the argument at fault."""
    if call.name == "blend":
        return _blend(call, source, prompts)
    if call.name == "and":
        return Conjunction(_parts(source, prompts, call.arguments))
    if call.name == "schedule":
        return _scheduled(call, source, prompts)
    told = ", ".join(f".{name}()" for name in NAMES)
    raise source.refuse(call.at, f".{call.name[:20]}() is none of {told}")


def _blend(call: Call, source: Source, prompts: tuple[Prompt, ...]) -> Blend:
    given = call.arguments
    normalize = not (given and given[-1][1] == UNNORMALIZED)
    parts = _parts(source, prompts, given if normalize else given[:-1])
    if normalize and not can_be_normalized([part.weight for part in parts]):
        raise source.refuse(call.at, f"the weights add up to nothing; {UNNORMALIZED} takes them as they are")
    return Blend(parts, normalize)


def can_be_normalized(weights: list[float]) -> bool:
    """Whether they stay in range when they are divided by their sum."""
    total = abs(sum(weights))
    return total > 0.0 and max(map(abs, weights)) <= MAX_WEIGHT * total


def _parts(source: Source, prompts: tuple[Prompt, ...], weights_given: tuple[tuple[int, str], ...]) -> tuple[Part, ...]:
    if weights_given and len(weights_given) != len(prompts):
        raise source.refuse(weights_given[0][0], f"{len(weights_given)} weights for {len(prompts)} prompts")
    weights = [weight(source, at, written) for at, written in weights_given] or [1.0] * len(prompts)
    return tuple(Part(prompt, each) for prompt, each in zip(prompts, weights, strict=True))


def _scheduled(call: Call, source: Source, prompts: tuple[Prompt, ...]) -> Scheduled:
    base, *others = prompts
    if len(call.arguments) != len(others):
        reason = f"{len(call.arguments)} ranges for the {len(others)} prompts after the first"
        raise source.refuse(call.at, reason)
    entries: list[Entry] = []
    for (at, written), prompt in zip(call.arguments, others, strict=True):
        match = _RANGE.fullmatch(written)
        if match is None:
            raise source.refuse(at, f"{written[:20] or 'nothing'} is no range: 10-20 holds, 10~20 goes there")
        begin = moment(source, at, match["begin"])
        end = moment(source, at + match.start("end"), match["end"])
        if not rises(begin, end):
            raise source.refuse(at + match.start("end"), f"the range {written[:40]} ends before it begins")
        if entries and not follows(entries[-1].end, begin):
            raise source.refuse(at, f"the range {written[:40]} begins before the one in front of it ends")
        entries.append(Entry(begin, end, prompt, ramp=match["way"] == "~"))
    return Scheduled(base, tuple(entries))


def _unquoted(source: Source, string: re.Match[str]) -> Source:
    text = string["text"]
    dropped = tuple(match.start() - count for count, match in enumerate(_ESCAPE.finditer(text)))
    return Source(_ESCAPE.sub(r"\1", text), source.field, string.start("text"), dropped, inside=source)
