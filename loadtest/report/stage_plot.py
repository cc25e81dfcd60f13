"""Where a job's time goes, in groups of jobs from the fastest to the slowest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from loadtest.report.drawing import BLUE, GREEN, GREY, INK, ORANGE, PALE, PINK, RED, SKY, YELLOW, Canvas, LeftOut, Plot
from loadtest.report.results import Result, timings
from loadtest.samples import Outcome, Sample
from serve.domain.jobs import Timings
from serve.stages import STAGES, stages

_GROUPS = (
    (0.0, 50.0, "fastest half"),
    (50.0, 90.0, "50 to 90 %"),
    (90.0, 99.0, "90 to 99 %"),
    (99.0, 100.0, "slowest 1 %"),
)
_LEAST = 0.02
"""Stages that take less of every group's time are told together."""
_OTHERS, OUTSIDE = "other stages", "in no stage"
_LOOKS = {
    "admission": (SKY, "////"),
    "retried": (INK, ""),
    "queued": (BLUE, ""),
    "claim": (BLUE, "////"),
    "text": (ORANGE, ""),
    "input": (ORANGE, "////"),
    "source": (ORANGE, "...."),
    "batch": (GREEN, ""),
    "steps": (PINK, ""),
    "decode_wait": (SKY, "...."),
    "decode": (SKY, ""),
    "compress": (RED, ""),
    "put": (RED, "////"),
    "told": (YELLOW, ""),
    _OTHERS: (GREY, ""),
    OUTSIDE: (PALE, ""),
}
"""A stage looks the same in every report."""
_DARK = (BLUE, GREEN, RED, INK, GREY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """So many jobs, and their mean seconds by stage; `OUTSIDE` is what is left of the latency."""

    name: str
    jobs: int
    seconds: dict[str, float]

    @property
    def whole(self) -> float:
        return sum(self.seconds.values())


def groups(result: Result) -> list[Group]:
    """From the fastest to the slowest; those with no job left out."""
    told = [(one, found) for one in result.stayed if one.outcome is Outcome.DONE and (found := timings(one))]
    told.sort(key=lambda each: each[0].latency_s)
    cut = [(name, told[_place(low, told) : _place(high, told)]) for low, high, name in _GROUPS]
    return [Group(name=name, jobs=len(members), seconds=_means(members)) for name, members in cut if members]


def stage_times(result: Result) -> Plot | LeftOut:
    """A job's mean time by stage."""
    title = "Where a job's time goes"
    told = groups(result)
    if not told:
        return LeftOut(title=title, why="no job told of its stages")
    canvas = Canvas(title, height_in=1.7 + 0.5 * len(told))
    (axes,) = canvas.panels
    length, unit = (1.0, "s") if max(group.whole for group in told) >= 2 else (1e3, "ms")
    _bars(axes, told, length)
    for row, group in enumerate(told):
        axes.text(group.whole * length, row, f"  {_number(group.whole * length, unit)}", va="center", fontsize=9)
    axes.set_yticks(range(len(told)), [f"{group.name}\n{_jobs(group.jobs)}" for group in told])
    axes.set_xlim(0, 1.1 * max(group.whole for group in told) * length)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"mean time of a job ({unit})")
    canvas.heading()
    caption = (
        "Jobs by latency, from the intended send time. In no stage: the client, the network, the way of the file, and "
        "the turns between the parts."
    )
    return Plot(name="stages", title=title, caption=caption, png=canvas.png())


def _bars(axes: Axes, told: Sequence[Group], length: float) -> None:
    left = np.zeros(len(told))
    widest = max(group.whole for group in told) * length
    for name, seconds in _segments(told):
        color, hatch = _LOOKS[name]
        values = np.array(seconds) * length
        look: dict[str, Any] = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.4, "height": 0.62}
        axes.barh(range(len(told)), values, left=left, label=name.replace("_", " "), **look)
        for row, (value, start) in enumerate(zip(values, left, strict=True)):
            if value > 0.06 * widest and not hatch:
                tone = "white" if color in _DARK else INK
                text = _number(value, "s" if length == 1 else "ms")
                axes.text(start + value / 2, row, text, ha="center", va="center", fontsize=8, color=tone)
        left += values


def _segments(told: Sequence[Group]) -> list[tuple[str, list[float]]]:
    """(stage, seconds by group) in the order of the stages, those worth a colour of their own first."""
    own = [name for name in STAGES if any(group.seconds[name] > _LEAST * group.whole for group in told)]
    rest = [sum(group.seconds[name] for name in STAGES if name not in own) for group in told]
    alone = [(name, [group.seconds[name] for group in told]) for name in own]
    return [*alone, (_OTHERS, rest), (OUTSIDE, [group.seconds[OUTSIDE] for group in told])]


def _place(percent: float, told: Sequence[object]) -> int:
    return round(len(told) * percent / 100)


def _means(members: Sequence[tuple[Sample, Timings]]) -> dict[str, float]:
    sums = dict.fromkeys((*STAGES, OUTSIDE), 0.0)
    for sample, found in members:
        told = stages(found)
        for name, seconds in told:
            sums[name] += seconds
        sums[OUTSIDE] += max(0.0, sample.latency_s - sum(seconds for _, seconds in told))
    return {name: seconds / len(members) for name, seconds in sums.items()}


def _number(value: float, unit: str) -> str:
    return f"{value:.2f}" if unit == "s" else f"{value:.0f}"


def _jobs(number: int) -> str:
    return "1 job" if number == 1 else f"{number:,} jobs"
