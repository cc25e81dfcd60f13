"""The plots of `tandem simulate`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loadtest.report.drawing import BLUE, GREEN, GREY, ORANGE, RED, Canvas, Plot, style
from serve.simulate.answer import Answer
from serve.simulate.outcome import Outcome

_BINS = 60


def plots(answer: Answer) -> list[Plot]:
    """The run over time, its latencies, how busy Redis is; what the sizes cost where they were asked for."""
    with style():
        made = [_course(answer.outcome), _latency(answer.outcome), _redis(answer)]
        if any(pool.least < pool.most for pool in answer.outcome.pools):
            made.append(_replicas(answer.outcome))
        if any(each.replicas is not None for each in answer.sizes):
            made.append(_sizes(answer))
    return made


def _course(found: Outcome) -> Plot:
    canvas = Canvas("The course of the simulation", rows=3, height_in=6.0)
    rates, waits, fleet = canvas.panels
    edges = np.linspace(0, found.duration_s, _BINS + 1)
    width, hours = edges[1] - edges[0], edges[:-1] / 3600
    due = [fate.due_s for fate in found.fates]
    done = [fate.done_s for fate in found.fates if fate.done_s is not None]
    for times, color, label in ((due, BLUE, "due"), (done, GREEN, "done")):
        rates.plot(hours, found.slices * np.histogram(times, edges)[0] / width, color=color, label=label)
    rates.set_ylabel("orders a second")
    waits.plot(hours, _by_bin(found, edges), color=ORANGE, label="P95 of those due then")
    waits.set_ylabel("seconds")
    moments = [each for each in found.moments if each.at_s <= found.duration_s]
    at = [each.at_s / 3600 for each in moments]
    fleet.plot(at, [found.slices * each.queued for each in moments], color=RED, label="waiting jobs")
    fleet.plot(at, [found.slices * each.rows for each in moments], color=BLUE, label="images in hand")
    fleet.plot(at, [found.slices * each.alive for each in moments], color=GREY, label="replicas")
    fleet.set_xlabel("time after the start (h)")
    for axes in canvas.panels:
        axes.set_ylim(bottom=0)
        if axes is not fleet:
            axes.legend(loc="upper right", fontsize=8)
    canvas.heading(fleet)
    return Plot(name="course", title="Course", caption="Of all slices together.", png=canvas.png())


def _replicas(found: Outcome) -> Plot:
    canvas = Canvas("Cards of each pool, as the policy decides")
    (axes,) = canvas.panels
    for pool in found.pools:
        at = [each / 3600 for each, _ in pool.course if each <= found.duration_s]
        cards = [found.slices * number for each, number in pool.course if each <= found.duration_s]
        axes.step([*at, found.duration_s / 3600], [*cards, cards[-1]], where="post", label=pool.name)
    axes.set_xlabel("time after the start (h)")
    axes.set_ylabel("cards, those that start included")
    axes.set_ylim(bottom=0)
    canvas.heading()
    return Plot(name="replicas", title="Replicas", caption="Of all slices together.", png=canvas.png())


def _by_bin(found: Outcome, edges: np.ndarray) -> Sequence[float]:
    """P95 of the orders that were due in each bin; a gap where there are none that were done."""
    places = np.digitize([fate.due_s for fate in found.fates], edges) - 1
    taken = np.array([np.nan if fate.latency_s is None else fate.latency_s for fate in found.fates])
    bins = [taken[(places == place) & ~np.isnan(taken)] for place in range(len(edges) - 1)]
    return [float(np.percentile(each, 95)) if len(each) else float("nan") for each in bins]


def _latency(found: Outcome) -> Plot:
    canvas = Canvas("Latency, share of all orders that were due")
    (axes,) = canvas.panels
    for model in sorted({fate.model for fate in found.fates}):
        own = [fate for fate in found.fates if fate.model == model]
        taken = sorted(fate.latency_s for fate in own if fate.latency_s is not None)
        axes.plot(taken, (np.arange(len(taken)) + 1) / len(own), label=model)
    axes.axhline(0.95, color=GREY, linewidth=0.8)
    if any(fate.latency_s for fate in found.fates):
        axes.set_xscale("log")
    axes.set_ylim(0, 1)
    axes.set_xlabel("seconds from when an order was due")
    canvas.heading()
    return Plot(name="latency", title="Latency", caption="It ends below 1 where orders were refused.", png=canvas.png())


def _redis(answer: Answer) -> Plot:
    found, redis = answer.outcome, answer.outcome.redis
    canvas = Canvas("One job Redis, by the size of fleet and traffic")
    (axes,) = canvas.panels
    times = np.geomspace(min(0.1, redis.growth / 10), max(10.0, 2 * redis.growth), 100)
    orders = times * found.slices * len(found.fates) / found.duration_s
    axes.plot(orders, redis.linear * times, color=GREEN, label="orders, telling, claims, signs of life")
    axes.plot(orders, redis.square * times**2, color=ORANGE, label="long queues, ETAs")
    axes.plot(orders, redis.linear * times + redis.square * times**2, color=BLUE, label="all")
    axes.axhline(1, color=RED, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("orders a second")
    axes.set_ylabel("share of its time")
    canvas.heading()
    return Plot(name="redis", title="Redis", caption="Full where the blue line meets the red one.", png=canvas.png())


def _sizes(answer: Answer) -> Plot:
    canvas = Canvas(f"Cards for a P95 of {answer.p95_s:g} s")
    (axes,) = canvas.panels
    found = [each for each in answer.sizes if each.replicas is not None]
    bars = axes.barh([f"{each.pool} ({each.gpu_class})" for each in found], [each.replicas or 0 for each in found])
    axes.bar_label(bars, [f"{each.replicas} cards, {each.cost_per_hour:g} an hour" for each in found], padding=3)
    axes.set_xlabel("cards")
    axes.margins(x=0.3)
    canvas.heading()
    return Plot(name="sizes", title="Sizes", caption="Each pool alone.", png=canvas.png())
