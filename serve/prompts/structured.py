"""A prompt in pieces, as JSON has them -> the tree that text of the same meaning gives.

    [{"text": "a sunset", "weight": 0.7}, {"text": "a beach"}]      a blend; its weights are divided by their sum
    [{"from": 10, "to": 0.8, "prompt": ..., "ramp": true}]          entries over a base prompt

`from` and `to` are steps where they are whole numbers, and shares of the steps where they have a point (1.0 is the
end). Errors name the piece: `schedule.1.to`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

from serve.domain.text import Syntax
from serve.errors import InvalidRequest
from serve.prompts.ast import Blend, Composition, Conjunction, Entry, Part, Prompt, Scheduled, When
from serve.prompts.calls import MAX_CALLS, can_be_normalized
from serve.prompts.parse import parse
from serve.prompts.places import MAX_PARTS, MAX_WEIGHT, follows

Pieces: TypeAlias = Sequence[Mapping[str, Any]]
_WEIGHTS_SUM = 1e-6
"""A sum of weights this close to 1 is 1."""
_END = When(1.0, share=True)


def blended(pieces: Pieces, field: str = "prompt", syntax: Syntax = Syntax.A1111) -> Prompt:
    """A normalized blend of the pieces; the prompt itself where one of weight 1 is alone. Raises InvalidRequest."""
    _count(pieces, field)
    parts = tuple(_piece(piece, f"{field}.{at}", syntax) for at, piece in enumerate(pieces))
    if not can_be_normalized([part.weight for part in parts]):
        raise InvalidRequest(f"{field}: the weights add up to nothing", field)
    alone = len(parts) == 1 and parts[0].weight == 1.0
    return _shallow(parts[0].prompt if alone else Blend(parts), field)


def scheduled(
    base: Prompt,
    entries: Pieces,
    num_inference_steps: int,
    field: str = "schedule",
    syntax: Syntax = Syntax.A1111,
) -> Scheduled:
    """`base` wherever no entry says otherwise. An entry's prompt is text, or pieces that are blended; without `to` it
    lasts until the end.

    Raises InvalidRequest for entries that overlap, fall back, hold no step or go past the last one.
    """
    _count(entries, field)
    if isinstance(base, Composition):
        raise InvalidRequest(f"{field}: a composition (AND) can't be scheduled", field)
    made: list[Entry] = []
    for at, entry in enumerate(entries):
        place = f"{field}.{at}"
        _check_keys(entry, {"from", "to", "prompt", "ramp"}, place)
        begin = _moment(entry.get("from"), num_inference_steps, f"{place}.from")
        end = _END if entry.get("to") is None else _moment(entry["to"], num_inference_steps, f"{place}.to")
        first, behind = begin.step(num_inference_steps), end.step(num_inference_steps)
        if behind <= first:
            told = "it ends before it begins" if behind < first else f"it holds no step of {num_inference_steps}"
            raise InvalidRequest(f"{place}.to: {told}", f"{place}.to")
        if made and (first < made[-1].end.step(num_inference_steps) or not follows(made[-1].end, begin)):
            raise InvalidRequest(f"{place}.from: begins before {field}.{at - 1} ends", f"{place}.from")
        ramp = entry.get("ramp", False)
        if not isinstance(ramp, bool):
            raise InvalidRequest(f"{place}.ramp: is neither true nor false", f"{place}.ramp")
        made.append(Entry(begin, end, _prompt(entry.get("prompt"), f"{place}.prompt", syntax), ramp))
    prompt = Scheduled(base, tuple(made))
    _shallow(prompt, field)
    return prompt


def sums(prompt: Prompt) -> tuple[float, ...]:
    """Of every normalized blend in it, the sum of the weights where it is not 1: what there is to report."""
    match prompt:
        case Blend(parts, normalize):
            total = sum(part.weight for part in parts)
            own = (total,) if normalize and abs(total - 1.0) > _WEIGHTS_SUM else ()
            return own + _sums_of(part.prompt for part in parts)
        case Conjunction(parts) | Composition(parts):
            return _sums_of(part.prompt for part in parts)
        case Scheduled(base, entries):
            return _sums_of([base, *(entry.prompt for entry in entries)])
        case _:
            return ()


def _sums_of(prompts: Iterable[Prompt]) -> tuple[float, ...]:
    return tuple(chain.from_iterable(map(sums, prompts)))


def _piece(piece: Mapping[str, Any], place: str, syntax: Syntax) -> Part:
    _check_keys(piece, {"text", "weight"}, place)
    weight = piece.get("weight")
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= MAX_WEIGHT:
        raise InvalidRequest(f"{place}.weight: must be a number within ±{MAX_WEIGHT:g}", f"{place}.weight")
    return Part(_text(piece.get("text"), f"{place}.text", syntax), float(weight))


def _prompt(value: object, place: str, syntax: Syntax) -> Prompt:
    if isinstance(value, list | tuple):
        return blended(value, place, syntax)
    return _text(value, place, syntax)


def _text(value: object, place: str, syntax: Syntax) -> Prompt:
    if not isinstance(value, str):
        raise InvalidRequest(f"{place}: must be text", place)
    prompt = parse(value, place, syntax)
    if isinstance(prompt, Composition):
        raise InvalidRequest(f"{place}: a composition (AND) can't be a piece of a prompt", place)
    return prompt


def _moment(value: object, num_inference_steps: int, place: str) -> When:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{place}: must be a step (10) or a share of the steps (0.5)", place)
    if isinstance(value, float):
        if not 0.0 <= value <= 1.0:
            raise InvalidRequest(f"{place}: a share of the steps lies between 0.0 and 1.0; a step has no point", place)
        return When(value, share=True)
    if value < 0:
        raise InvalidRequest(f"{place}: must not be negative", place)
    if value > num_inference_steps:
        raise InvalidRequest(f"{place}: step {value} lies past the last step, {num_inference_steps}", place)
    return When(float(value)) if value else When(0.0, share=True)


def _check_keys(piece: object, known: set[str], place: str) -> None:
    if not isinstance(piece, Mapping):
        raise InvalidRequest(f"{place}: must be an object of {', '.join(sorted(known))}", place)
    for key in piece:
        if key not in known:
            raise InvalidRequest(f"{place}: has no {str(key)[:20]!r}; there are {', '.join(sorted(known))}", place)


def _count(pieces: Pieces, field: str) -> None:
    if not 1 <= len(pieces) <= MAX_PARTS:
        raise InvalidRequest(f"{field}: must have between 1 and {MAX_PARTS} pieces", field)


def _shallow(prompt: Prompt, field: str) -> Prompt:
    """`prompt`, if text of it can be read again."""
    if _depth(prompt) > MAX_CALLS:
        raise InvalidRequest(f"{field}: more than {MAX_CALLS} blends and schedules inside one another", field)
    return prompt


def _depth(prompt: Prompt) -> int:
    """Calls inside one another."""
    match prompt:
        case Blend(parts) | Conjunction(parts):
            return 1 + max(_depth(part.prompt) for part in parts)
        case Scheduled(base, entries):
            return 1 + max(map(_depth, [base, *(entry.prompt for entry in entries)]))
        case _:
            return 0
