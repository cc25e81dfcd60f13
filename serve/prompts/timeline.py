"""A prompt's tree -> the texts that the steps read, and which of them each step reads with which share.

Everything that changes with the steps is resolved here, so that an encoder sees nothing but texts: a switch and an
alternation are two texts that take turns, a ramp is two texts whose shares change from step to step.

`[a:b:5]` reads `a` in steps 0 to 4 and `b` from step 5 on, as A1111's published schedules have it. A ramp from step b
to step e reads (s - b) / (e - b) of the new text in step s. Ramps over the same steps go together; others multiply out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from serve.domain.conditioning import Mix
from serve.errors import InvalidRequest
from serve.prompts.ast import Blend, Composition, Conjunction, Entry, Part, Prompt, Scheduled
from serve.prompts.calls import can_be_normalized
from serve.prompts.flats import MAX_TEXTS, Flat, Frame, Shares, Slope, Span, Track

__all__ = ["MAX_TEXTS", "Flat", "Lanes", "Span", "Timeline", "timeline"]

Lanes: TypeAlias = tuple[tuple[float, Mix], ...]
"""A weight and a mix for each noise prediction: one, or as many as a composition (`AND`) has parts."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """`texts` and, from the first step of each phase on, the mixes that are read of them. Phases begin at step 0, rise,
    and each differs from the one before.

    `slots[i]` is the place of text i among the embeddings that `.and()` puts below one another, 0 where there is none.
    A mix has texts for every place, and a text adds nothing in the places of others; one that stands in two places is
    listed twice.
    """

    texts: tuple[Flat, ...]
    slots: tuple[int, ...]
    phases: tuple[tuple[int, Lanes], ...]


def timeline(prompt: Prompt, num_inference_steps: int, field: str = "prompt") -> Timeline:
    """Raises InvalidRequest that names `field` and the place for what lies past the last step, for a weight out of
    range and for more than MAX_TEXTS texts."""
    frame = Frame(num_inference_steps, field)
    parts = prompt.parts if isinstance(prompt, Composition) else (Part(prompt),)
    lanes = [(part.weight, _node(part.prompt, frame)) for part in parts]
    places: dict[tuple[Flat, int], int] = {}
    depth = max(node.depth for _, node in lanes)
    phases: list[tuple[int, Lanes]] = []
    for step in sorted({0} | _together(node.moments for _, node in lanes)):
        now = tuple((weight, _mix(_deepened(node.at(step), depth), places)) for weight, node in lanes)
        if len(places) > MAX_TEXTS:
            raise frame.too_many()
        if not phases or phases[-1][1] != now:
            phases.append((step, now))
    return Timeline(tuple(flat for flat, _ in places), tuple(slot for _, slot in places), tuple(phases))


_Value: TypeAlias = tuple[Shares, ...]
"""What a prompt is in one step: the shares of texts in each place of `.and()`."""
_EMPTY: Shares = {(): 1.0}


def _deepened(value: _Value, depth: int) -> _Value:
    """Below what is shorter the empty text stands, as Compel pads it."""
    return (*value, *(_EMPTY,) * (depth - len(value)))


def _mix(value: _Value, places: dict[tuple[Flat, int], int]) -> Mix:
    """By index. A share of nothing stays: another blend of the same texts asks for no new one."""
    shares = {
        places.setdefault((flat, slot), len(places)): share
        for slot, texts in enumerate(value)
        for flat, share in texts.items()
    }
    return tuple((share, index) for index, share in sorted(shares.items()))


def _sum(parts: Iterable[tuple[float, _Value]]) -> _Value:
    """The weighted sum, place by place."""
    parts = list(parts)
    depth = max(len(value) for _, value in parts)
    total: tuple[Shares, ...] = tuple({} for _ in range(depth))
    for weight, value in parts:
        for slot, texts in zip(total, _deepened(value, depth), strict=True):
            for flat, share in texts.items():
                slot[flat] = slot.get(flat, 0.0) + weight * share
    return total


def _together(moments: Iterable[frozenset[int]]) -> frozenset[int]:
    return frozenset[int]().union(*moments)


class _Node(Protocol):
    """A whole prompt. `moments` are the steps behind the first at which it may change, `depth` the places it fills."""

    @property
    def moments(self) -> frozenset[int]: ...

    @property
    def depth(self) -> int: ...

    def at(self, step: int) -> _Value: ...


def _node(prompt: Prompt, frame: Frame) -> _Node:
    match prompt:
        case Blend():
            return _Blended(prompt, frame)
        case Conjunction():
            return _Stacked(prompt, frame)
        case Scheduled():
            return _Planned(prompt, frame)
        case Composition():
            raise InvalidRequest(f"{frame.field}: AND can't be inside another construct", frame.field)
    return _Said(Track(prompt, frame))


@dataclass(frozen=True, slots=True)
class _Said:
    track: Track
    depth: int = 1

    @property
    def moments(self) -> frozenset[int]:
        return self.track.moments

    def at(self, step: int) -> _Value:
        return (self.track.at(step),)


class _Blended:
    def __init__(self, blend: Blend, frame: Frame) -> None:
        weights = [part.weight for part in blend.parts]
        if blend.normalize and not can_be_normalized(weights):
            raise InvalidRequest(f"{frame.field}: the weights of a blend add up to nothing", frame.field)
        total = sum(weights) if blend.normalize else 1.0
        self._parts = [(part.weight / total, _node(part.prompt, frame)) for part in blend.parts]
        self.moments = _together(node.moments for _, node in self._parts)
        self.depth = max(node.depth for _, node in self._parts)

    def at(self, step: int) -> _Value:
        return _sum((share, node.at(step)) for share, node in self._parts)


class _Stacked:
    """A part that weighs w is w of itself and 1 - w of the empty text, which is Compel's rule."""

    def __init__(self, conjunction: Conjunction, frame: Frame) -> None:
        self._parts = [(part.weight, _node(part.prompt, frame)) for part in conjunction.parts]
        self.moments = _together(node.moments for _, node in self._parts)
        self.depth = sum(node.depth for _, node in self._parts)

    def at(self, step: int) -> _Value:
        value: list[Shares] = []
        for weight, node in self._parts:
            one = _deepened(node.at(step), node.depth)
            value += one if weight == 1.0 else _sum([(weight, one), (1.0 - weight, (_EMPTY,))])
        return tuple(value)


@dataclass(frozen=True, slots=True)
class _Leg:
    """From `slope.begin` on, until the next one begins: `node`, and in a ramp less and less of what it comes from."""

    slope: Slope
    node: _Node
    before: _Node | None = None

    @property
    def moments(self) -> frozenset[int]:
        own = frozenset(range(self.slope.begin, self.slope.end + 1)) | self.node.moments
        return own if self.before is None else own | self.before.moments

    @property
    def depth(self) -> int:
        return self.node.depth if self.before is None else max(self.node.depth, self.before.depth)

    def at(self, step: int) -> _Value:
        share = self.slope.at(step)
        if self.before is None or share == 1.0:
            return self.node.at(step)
        if share == 0.0:
            return self.before.at(step)
        return _sum([(1.0 - share, self.before.at(step)), (share, self.node.at(step))])


class _Planned:
    """The base wherever no entry says otherwise; behind a ramp, what it went to. A ramp comes from the entry that ends
    where it begins, if there is one."""

    def __init__(self, plan: Scheduled, frame: Frame) -> None:
        base = _node(plan.base, frame)
        legs = [_Leg(Slope(0, 0), base)]
        for number, entry in enumerate(plan.entries, 1):
            begin, end = _bounds(entry, number, frame)
            free = legs[-1].slope.begin
            if begin < free:
                raise InvalidRequest(
                    f"{frame.field}: part {number} of the schedule begins before the last one ends", frame.field
                )
            node = _node(entry.prompt, frame)
            if entry.ramp:
                # The leg that held until here, even where the base comes back at this very step.
                last = next((leg for leg in reversed(legs) if leg.slope.begin < begin), legs[0])
                legs.append(_Leg(Slope(begin, end), node, last.node))
                base = node
            else:
                legs.append(_Leg(Slope(begin, begin), node))
            legs.append(_Leg(Slope(end, end), base))
        self._legs = legs
        self.moments = _together(leg.moments for leg in legs) & frozenset(range(frame.steps))
        self.depth = max(leg.depth for leg in legs)

    def at(self, step: int) -> _Value:
        return next(leg for leg in reversed(self._legs) if leg.slope.begin <= step).at(step)


def _bounds(entry: Entry, number: int, frame: Frame) -> tuple[int, int]:
    def shown() -> str:
        return f"part {number} of the schedule"

    begin, end = frame.step(entry.begin, shown), frame.step(entry.end, shown)
    if end < begin:
        raise InvalidRequest(f"{frame.field}: {shown()} ends before it begins", frame.field)
    return begin, end
