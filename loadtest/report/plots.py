"""The plots of a report: what the clients saw; `stage_plot` and `server_plots` have the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from loadtest.report.drawing import (
    BLUE,
    CYCLE,
    GREEN,
    PALE,
    RED,
    Canvas,
    LeftOut,
    Plot,
    bins,
    duration,
    end_of,
    style,
    time_axis,
)
from loadtest.report.results import Result, pictures
from loadtest.report.server_plots import batch, cache_hits, queue, replicas
from loadtest.report.stage_plot import stage_times
from loadtest.report.thresholds import shown
from loadtest.samples import Outcome, Sample
from loadtest.tail import Tail

Draw = Callable[[Result], Plot | LeftOut]


def plots(result: Result) -> tuple[list[Plot], list[LeftOut]]:
    """All that the run has data for, and why the others are not there."""
    draws: tuple[Draw, ...] = (latency, rates, stage_times, batch, cache_hits, queue, replicas)
    with style():
        made = [draw(result) for draw in draws]
    return [one for one in made if isinstance(one, Plot)], [one for one in made if isinstance(one, LeftOut)]


def latency(result: Result) -> Plot | LeftOut:
    """The distribution function of latency, by dialect: as far up as requests were finished."""
    title = "Latency"
    by_dialect: dict[str, list[Sample]] = {}
    for one in result.stayed:
        if one.outcome is not Outcome.REFUSED:
            by_dialect.setdefault(one.dialect, []).append(one)
    canvas = Canvas(title)
    (axes,) = canvas.panels
    ends: list[float] = []
    for color, (dialect, taken) in zip(CYCLE * 2, sorted(by_dialect.items()), strict=False):
        seconds = sorted(max(one.latency_s, 1e-4) for one in taken if one.outcome is Outcome.DONE)
        p95 = math.inf if (found := Tail.of(taken).p95) is None else found
        label = f"{dialect}: {len(seconds):,} of {len(taken):,}, P95 {shown(p95, 's')}"
        shares = [number / len(taken) for number in range(len(seconds) + 1)] if seconds else []
        axes.plot([*seconds[:1], *seconds], shares, color=color, label=label, drawstyle="steps-post")
        ends += (*seconds[:1], *seconds[-1:])
    if not ends:
        return LeftOut(title=title, why="no request was finished")
    _log_seconds(axes, ends, result)
    axes.set_ylabel("share that was finished")
    axes.set_ylim(0, 1.01)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 0.95, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    canvas.heading()
    caption = (
        "From the intended send time to the picture; a share of the requests that were not refused, of which each line "
        "says how many were finished. What never came is above the end of its line."
    )
    return Plot(name="latency", title=title, caption=caption, png=canvas.png())


def _log_seconds(axes: Axes, ends: Sequence[float], result: Result) -> None:
    axes.set_xscale("log")
    low, high = min(*ends, result.deadline_s) / 1.4, max(*ends, result.deadline_s) * 1.4
    axes.set_xlim(low, high)
    ticks = [factor * 10.0**power for power in range(-5, 5) for factor in (1, 2, 5)]
    seen = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(seen if len(seen) <= 10 else [tick for tick in seen if f"{tick:.0e}".startswith("1")])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: duration(tick) if tick < 1 else f"{tick:g} s"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    axes.set_xlabel("latency from the intended send time (log scale)")
    axes.axvline(result.deadline_s, color=RED, linestyle="--", linewidth=1.2)
    right = result.deadline_s * 3 > high
    axes.annotate(
        f"deadline {duration(result.deadline_s)}",
        (result.deadline_s, 0.04),
        xytext=(-4 if right else 4, 0),
        textcoords="offset points",
        ha="right" if right else "left",
        color=RED,
        fontsize=9,
    )


def rates(result: Result) -> Plot | LeftOut:
    """What was asked, what was finished, what was finished in time, over time."""
    title = "Throughput and goodput"
    asked = result.counting(result.samples)
    if not asked:
        return LeftOut(title=title, why="nothing was asked")
    end = end_of(result)
    edges = bins(end, least_s=max(1.0, 10 * result.duration_s / len(asked)), most=60)
    done = [one for one in asked if one.outcome is Outcome.DONE]
    canvas = Canvas(title)
    (axes,) = canvas.panels
    _steps(axes, edges, [one.due_s for one in asked], None, color=PALE, label="offered", fill=True)
    weights = [pictures(one) for one in done]
    _steps(axes, edges, [one.ended_s for one in done], weights, color=BLUE, label="throughput")
    good = [one for one in done if result.good(one)]
    label = f"goodput: within {duration(result.deadline_s)}"
    _steps(
        axes, edges, [one.ended_s for one in good], [pictures(one) for one in good], color=GREEN, label=label, dash=True
    )
    refused = [one.ended_s for one in asked if one.outcome is Outcome.REFUSED]
    if refused:
        _steps(axes, edges, refused, None, color=RED, label="refused", thin=True)
    axes.set_ylabel(f"{result.unit} a second")
    time_axis(canvas, result, edges[-1])
    canvas.heading()
    width = edges[1] - edges[0]
    caption = f"In bins of {duration(width)}. Offered goes by when a request was due, the others by when it ended."
    return Plot(name="throughput", title=title, caption=caption, png=canvas.png())


def _steps(
    axes: Axes,
    edges: Sequence[float],
    times: Sequence[float],
    weights: Sequence[float] | None,
    *,
    color: str,
    label: str,
    fill: bool = False,
    dash: bool = False,
    thin: bool = False,
) -> None:
    heights = np.histogram(times, edges, weights=weights)[0] / (edges[1] - edges[0])
    look: dict[str, Any] = {"linestyle": (0, (4, 1.5)) if dash else "-", "linewidth": 1.2 if thin else 1.8}
    baseline, layer = (0, 0.5) if fill else (None, 2)
    axes.stairs(heights, edges, color=color, label=label, fill=fill, baseline=baseline, zorder=layer, **look)
