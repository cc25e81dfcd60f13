"""The house style of a report's plots: sizes, colours, axes. Drawn with matplotlib's Agg, without any global state."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from loadtest.report.results import Result

BLUE, ORANGE, GREEN, RED, PINK, SKY, YELLOW, INK, GREY, PALE = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#1A1A1A",
    "#767676",
    "#DADADA",
)
"""Colours that people with any colour vision tell apart (Okabe & Ito, https://jfly.uni-koeln.de/color/), and greys."""
CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, RED, INK)
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.size": 10,
    "grid.color": "#EBEBEB",
    "hatch.linewidth": 0.5,
    "legend.borderaxespad": 0,
    "legend.columnspacing": 1.4,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.8,
    "patch.linewidth": 1.8,
    "savefig.facecolor": "white",
    "text.color": INK,
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
}
WIDTH_IN, HEIGHT_IN, DPI = 7.6, 3.8, 150
_COLUMNS = 5
_TITLE: dict[str, Any] = {"weight": "bold", "size": 11}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A finished plot: a PNG file called after `name`. `caption` says how to read it."""

    name: str
    title: str
    caption: str
    png: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A plot that the run has no data for."""

    title: str
    why: str


class Canvas:
    """Owns: one figure, until it is a PNG."""

    def __init__(self, title: str, rows: int = 1, height_in: float = HEIGHT_IN) -> None:
        """`rows` are panels that share their x axis."""
        self._figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")
        FigureCanvasAgg(self._figure)
        self._title = title
        self.panels: list[Axes] = list(self._figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])

    def note(self, text: str) -> None:
        """Small print below everything."""
        self._figure.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color=GREY)

    def heading(self, axes: Axes | None = None) -> None:
        """The title and, below it, what the colours mean: above everything, so that it hides nothing. The meanings are
        those of these axes, or of the first."""
        handles, labels = (axes or self.panels[0]).get_legend_handles_labels()
        if not labels:
            self._figure.suptitle(self._title, x=0.01, ha="left", **_TITLE)
            return
        columns = min(len(labels), _COLUMNS)
        by_column = [number for column in range(columns) for number in range(column, len(labels), columns)]
        self._figure.legend(
            [handles[number] for number in by_column],
            [labels[number] for number in by_column],
            loc="outside upper left",
            ncols=columns,
            fontsize=9,
            markerscale=2,
            title=self._title,
            title_fontproperties=_TITLE,
            alignment="left",
        )

    def png(self) -> bytes:
        file = io.BytesIO()
        self._figure.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()


@contextlib.contextmanager
def style() -> Iterator[None]:
    with mpl.rc_context(_STYLE):
        yield


def nice(seconds: float) -> float:
    """The next round number of seconds from 1 on; what is a trace beyond one is that one."""
    for width in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800):
        if seconds <= 1.02 * width:
            return float(width)
    return 3600.0 * math.ceil(seconds / 3600)


def bins(end_s: float, least_s: float, most: int = 60) -> list[float]:
    """Edges from 0 to the end or a little beyond, at least `least_s` apart, for at most so many bins."""
    width = nice(max(least_s, end_s / most))
    return [width * number for number in range(math.ceil(end_s / width) + 1)]


def end_of(result: Result) -> float:
    """When the last request ended, or the arrival window."""
    return max([result.duration_s, *(one.ended_s for one in result.samples)])


def time_axis(canvas: Canvas, result: Result, end_s: float) -> None:
    """Seconds, minutes or hours after the start below the last panel; what no figure counts is shaded in all."""
    unit, length = ("h", 3600.0) if end_s > 4 * 3600 else ("min", 60.0) if end_s > 600 else ("s", 1.0)
    last = canvas.panels[-1]
    last.set_xlabel(f"time after the start ({unit})")
    step = _step(end_s / length) * length
    last.set_xticks([number * step for number in range(int(end_s / step) + 1)])
    last.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds / length:g}"))
    for axes in canvas.panels:
        axes.set_xlim(0, end_s)
        axes.set_ylim(bottom=0)
        axes.grid(visible=False, axis="x")
        for since, until, why in ((0.0, result.warm_up_s, "warm-up"), (result.duration_s, end_s, "after the arrivals")):
            if until > since:
                axes.axvspan(since, until, facecolor="none", edgecolor="#C4C4C4", hatch="///", linewidth=0, zorder=0.9)
            if axes is canvas.panels[0] and until - since > 0.012 * len(why) * end_s:
                where: dict[str, Any] = {
                    "transform": axes.get_xaxis_transform(),
                    "ha": "center",
                    "va": "top",
                    "fontsize": 8,
                }
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                axes.text((since + until) / 2, 0.97, why, color=GREY, bbox=box, **where)


def whole_numbers(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def duration(seconds: float) -> str:
    """`250 ms`, `1.5 s`, `2 min`."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min"


def _step(span: float) -> float:
    """Between ticks: some six to twelve of them at round numbers."""
    power = 10.0 ** math.floor(math.log10(span / 6))
    return next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= 12)
