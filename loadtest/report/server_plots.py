"""Plots of what the server tells of itself: its metrics over time, and the jobs' own reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from loadtest.report.drawing import (
    BLUE,
    CYCLE,
    GREY,
    ORANGE,
    RED,
    SKY,
    Canvas,
    LeftOut,
    Plot,
    bins,
    duration,
    end_of,
    time_axis,
    whole_numbers,
)
from loadtest.report.results import Result, timings
from loadtest.report.series import Points, amounts

_TIERS = (("memory", BLUE), ("redis", SKY), ("encoded", ORANGE))
_SIGNS = ("positive", "negative", "empty")
_NO_METRICS = "no metrics were read"


def batch(result: Result) -> Plot | LeftOut:
    """How many images shared a denoising step."""
    title = "Images a step"
    edges = _edges(result)
    steps, images = (_grown(result, f"tandem_engine_{which}_total", edges) for which in ("steps", "image_steps"))
    jobs = [(one.ended_s, told.batch_images) for one in result.samples if (told := timings(one))]
    dots = [(at, shared) for at, shared in jobs if shared is not None]
    if not steps and not dots:
        return LeftOut(title=title, why=f"{_NO_METRICS}, and no job told what its steps were shared with")
    canvas = Canvas(title)
    (axes,) = canvas.panels
    if dots:
        size = 9 if len(dots) < 1000 else 3
        times, shared_with = zip(*dots, strict=True)
        axes.scatter(times, shared_with, s=size, color=GREY, alpha=0.5, linewidths=0, label="one job's steps")
    if steps:
        made = np.array(steps[()])
        mean = np.divide(images.get((), np.zeros(len(made))), made, out=np.full(len(made), np.nan), where=made > 0)
        axes.stairs(mean, edges, baseline=None, color=BLUE, label="all steps, mean")
        canvas.note(_refreshed(result))
    axes.set_ylabel("images a step")
    time_axis(canvas, result, edges[-1])
    canvas.heading()
    caption = "A dot is a job, at the time of its end: how many images shared its steps on average. "
    return Plot(name="batch", title=title, caption=caption + _line(bool(steps)), png=canvas.png())


def _line(there: bool) -> str:
    return "The line is the mean over all steps of all replicas." if there else ""


def cache_hits(result: Result) -> Plot | LeftOut:
    """Text units a second, by the side of the guidance and by where they came from."""
    title = "Where text came from"
    edges = _edges(result)
    grown = result.series.growth("tandem_text_units_total", "sign", "tier")
    told = {key: np.array(amounts(parts, _unix(edges, result))) for key, parts in grown.items()}
    told = {key: units for key, units in told.items() if units.sum() > 0}
    signs = [sign for sign in _SIGNS if any(key[0] == sign for key in told)]
    note = _refreshed(result)
    if not signs:
        told, signs, note = _told_by_jobs(result, edges), [""], "From the jobs' own reports: no metrics were read."
    if not told:
        return LeftOut(title=title, why=f"{_NO_METRICS}, and no job told of its text")
    canvas = Canvas(title, rows=len(signs), height_in=1.5 + 1.25 * len(signs))
    width = edges[1] - edges[0]
    for axes, sign in zip(canvas.panels, signs, strict=True):
        floor = np.zeros(len(edges) - 1)
        for tier, color in _TIERS:
            height = told.get((sign, tier), np.zeros(len(floor))) / width
            axes.bar(
                edges[:-1],
                height,
                width,
                bottom=floor,
                align="edge",
                color=color,
                edgecolor="white",
                linewidth=0.4,
                label=tier,
            )
            floor = floor + height
        whole = sum(told[key].sum() for key in told if key[0] == sign)
        hits = 1 - told.get((sign, "encoded"), np.zeros(1)).sum() / whole
        axes.set_title(f"{sign or 'all'} text: {hits:.1%} from a cache", fontsize=9)
        axes.set_ylabel("units a second", fontsize=9)
    canvas.note(note)
    time_axis(canvas, result, edges[-1])
    canvas.heading()
    caption = (
        "Text units by the side of the guidance that reads them. Empty text is one that all share: count it apart."
    )
    return Plot(name="cache", title=title, caption=caption, png=canvas.png())


def _told_by_jobs(result: Result, edges: Sequence[float]) -> dict[tuple[str, ...], np.ndarray]:
    found: dict[tuple[str, ...], np.ndarray] = {}
    jobs = [(one.ended_s, one.job.get("cache")) for one in result.samples if one.job is not None]
    for tier, _ in _TIERS:
        units = [(at, cache.get(tier, 0)) for at, cache in jobs if cache]
        if any(number for _, number in units):
            times, weights = zip(*units, strict=True)
            found["", tier] = np.histogram(times, edges, weights=weights)[0]
    return found


def queue(result: Result) -> Plot | LeftOut:
    """How long and how many jobs waited."""
    title = "Queue"
    ages, depths = result.series.gauge("tandem_queue_age_seconds", "model"), result.series.gauge("tandem_queue_depth")
    if not ages and not depths:
        return LeftOut(title=title, why=_why(result, "none told of a queue"))
    canvas = Canvas(title, rows=2, height_in=4.4)
    above, below = canvas.panels
    for color, ((model,), points) in zip(CYCLE * 3, ages.items(), strict=False):
        above.plot(
            *_after_start(points, result), color=color, drawstyle="steps-post", label=model if len(ages) > 1 else None
        )
    above.set_ylabel("oldest job's wait (s)", fontsize=9)
    for points in depths.values():
        below.plot(*_after_start(points, result), color=GREY, drawstyle="steps-post")
    below.set_ylabel("jobs that wait", fontsize=9)
    whole_numbers(below)
    canvas.note(_looks(result))
    time_axis(canvas, result, _edges(result)[-1])
    canvas.heading()
    caption = "For how long the job has waited that has waited longest, and how many wait for a replica."
    return Plot(name="queue", title=title, caption=caption, png=canvas.png())


def replicas(result: Result) -> Plot | LeftOut:
    """Replicas that lived beside those that there should be."""
    title = "Diffusion replicas"
    alive = result.series.gauge("tandem_replicas", "placement")
    wanted = result.series.gauge("tandem_replicas_wanted", "placement")
    if not alive and not wanted:
        return LeftOut(title=title, why=_why(result, "none told of replicas"))
    canvas = Canvas(title, height_in=2.8)
    (axes,) = canvas.panels
    places = sorted({*alive, *wanted})
    for color, place in zip(CYCLE * 3, places, strict=False):
        name = f"{place[0] or 'all'}, " if len(places) > 1 else ""
        if place in wanted:
            look: dict[str, Any] = {
                "color": color if name else RED,
                "alpha": 0.35,
                "linewidth": 6,
                "solid_capstyle": "butt",
            }
            axes.plot(*_after_start(wanted[place], result), drawstyle="steps-post", label=f"{name}wanted", **look)
        if place in alive:
            axes.plot(*_after_start(alive[place], result), drawstyle="steps-post", label=f"{name}alive", color=color)
    axes.set_ylabel("replicas")
    whole_numbers(axes)
    canvas.note(_looks(result))
    time_axis(canvas, result, _edges(result)[-1])
    axes.set_ylim(
        0,
        1.25
        * max(
            1.0,
            *(value for points in (*alive.values(), *wanted.values()) for _, value in points if not math.isnan(value)),
        ),
    )
    canvas.heading()
    caption = "Those that the job store has heard of, and those that the settings and the load ask for."
    return Plot(name="replicas", title=title, caption=caption, png=canvas.png())


def _edges(result: Result) -> list[float]:
    """Bins no finer than the metrics are."""
    return bins(end_of(result), least_s=result.series.refresh_s if result.series else 1.0, most=40)


def _unix(edges: Sequence[float], result: Result) -> list[float]:
    return [result.started_at + edge for edge in edges]


def _grown(result: Result, name: str, edges: Sequence[float]) -> dict[tuple[str, ...], list[float]]:
    return {key: amounts(parts, _unix(edges, result)) for key, parts in result.series.growth(name).items()}


def _after_start(points: Points, result: Result) -> tuple[list[float], list[float]]:
    return [at - result.started_at for at, _ in points], [value for _, value in points]


def _refreshed(result: Result) -> str:
    often = duration(result.series.refresh_s)
    return f"The server's counters change about every {often}: no finer picture of them exists."


def _looks(result: Result) -> str:
    if gaps := len(result.series.gaps):
        return f"A break in a line is a time of which nothing is known; {gaps} looks at the metrics found nothing."
    return "Ray hands gauges on about every ten seconds: what is shown may be as old."


def _why(result: Result, none: str) -> str:
    return none if result.series else _NO_METRICS
