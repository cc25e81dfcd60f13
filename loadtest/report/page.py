"""What is left of a run: `report.html` for people, PNG plots beside it, `result.json` for machines.

`result.json` holds everything, so that a report can be made again:

    workload, target, machine      names, and the line about where it ran
    started_at                     Unix seconds of the senders' zero: all other times are seconds after it
    duration_s, warm_up_s, deadline_s
    settings                       the workload as it was run
    summary                        every field of `loadtest.report.results.Summary`
    figures                        name -> number or null (no data, or endless): all that a threshold may name
    verdicts                       name, rule (at_most, at_least), bound, measured (null as in figures), met
    samples                        every field of `loadtest.samples.Sample`, and `latency_s`
    metrics                        name, labels, points [[time, value]]: where the value changed, null once gone
    looks                          how often the metrics were read: times, errors [[time, page, why]]
    plots                          name -> file; plots_left_out: title -> why
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from loadtest.report.drawing import LeftOut, Plot, duration
from loadtest.report.plots import plots
from loadtest.report.results import Result, Summary, summary, timings
from loadtest.report.series import Key
from loadtest.report.stage_plot import groups
from loadtest.report.thresholds import FIGURES, Verdict, check, finite, shown
from loadtest.samples import Outcome, Sample
from loadtest.tail import Tail
from serve.bench.stats import Percentiles
from serve.errors import OperatorError
from serve.stages import stages

REPORT, DATA = "report.html", "result.json"
_IN_TABLE = {"p50_s", "p95_s", "p99_s", "worst_s", "refused_p50_s", "refused_p99_s"}
_SLOWEST = 10
_STAGES_TOLD = 4


def write_report(result: Result, folder: Path) -> Path:
    """Writes the report's files into the folder, over older ones; returns the path of `report.html`.

    Raises OperatorError where the folder can't be written, and for a threshold of an unknown figure.
    """
    figures = summary(result)
    verdicts = check(figures, result.thresholds)
    drawn, left_out = plots(result)
    page = _page(result, figures, verdicts, drawn, left_out)
    data = json.dumps(_as_json(result, figures, verdicts, drawn, left_out), allow_nan=False, default=str)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for plot in drawn:
            (folder / f"{plot.name}.png").write_bytes(plot.png)
        (folder / DATA).write_text(data + "\n", encoding="utf-8")
        (folder / REPORT).write_text(page, encoding="utf-8")
    except OSError as error:
        raise OperatorError(f"{folder}: {error.strerror}", "out") from None
    return folder / REPORT


def _page(
    result: Result, figures: Summary, verdicts: Sequence[Verdict], drawn: Sequence[Plot], left_out: Sequence[LeftOut]
) -> str:
    environment = Environment(
        loader=PackageLoader("loadtest.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": _data_uri, "time": _time, "span": duration}
    started = datetime.fromtimestamp(result.started_at, UTC)
    return environment.get_template("report.html").render(
        result=result,
        summary=figures,
        when=f"{started:%Y-%m-%d %H:%M:%S} UTC",
        lasted=duration(result.duration_s),
        verdicts=[(verdict, shown(verdict.measured, verdict.unit), _bound(verdict)) for verdict in verdicts],
        met=all(verdict.met for verdict in verdicts),
        figures=[(each.what, shown(value, each.unit)) for each, value in _told(figures)],
        latencies=_latencies(figures),
        plots=drawn,
        left_out=left_out,
        stage_groups=groups(result),
        slowest=[_slow(one) for one in _slowest(result)],
        workload=yaml.safe_dump(
            json.loads(json.dumps(result.settings, default=str)), sort_keys=False, allow_unicode=True
        ),
    )


def _bound(verdict: Verdict) -> str:
    return f"{verdict.rule.replace('_', ' ')} {shown(verdict.bound, verdict.unit)}"


def _told(figures: Summary) -> Iterator[tuple[Any, float]]:
    """The figures that the run has, but for those that the table of latencies has."""
    for name, each in FIGURES.items():
        value = each.of(figures)
        if value is not None and name not in _IN_TABLE:
            yield each, value


def _latencies(figures: Summary) -> list[tuple[str, Tail | Percentiles]]:
    rows: list[tuple[str, Tail | Percentiles | None]] = [
        (f"all {figures.unit}", figures.latency),
        *figures.dialects.items(),
        ("refusals", figures.refusals),
    ]
    return [(name, of) for name, of in rows if of is not None]


def _slowest(result: Result) -> list[Sample]:
    done = [one for one in result.stayed if one.outcome is Outcome.DONE]
    return sorted(done, key=lambda one: one.latency_s, reverse=True)[:_SLOWEST]


def _slow(one: Sample) -> dict[str, str]:
    """A row of the slowest: its longest stages, the longest first."""
    job = one.job or {}
    found = timings(one)
    told = sorted(stages(found) if found else (), key=lambda stage: stage[1], reverse=True)[:_STAGES_TOLD]
    return {
        "id": str(job.get("id", "")),
        "dialect": one.dialect,
        "due": duration(one.due_s),
        "latency": _time(one.latency_s),
        "attempt": str(job.get("attempt", "")),
        "stages": ", ".join(f"{name.replace('_', ' ')} {_time(seconds)}" for name, seconds in told),
    }


def _time(seconds: float | None) -> str:
    """A percentile among those that never came is None."""
    return shown(math.inf if seconds is None else seconds, "s")


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _as_json(
    result: Result, figures: Summary, verdicts: Sequence[Verdict], drawn: Sequence[Plot], left_out: Sequence[LeftOut]
) -> dict[str, Any]:
    """The keys that this module's head lists."""
    pages = result.series.pages
    return {
        "workload": result.workload,
        "target": result.target,
        "machine": result.machine,
        "started_at": result.started_at,
        "duration_s": result.duration_s,
        "warm_up_s": result.warm_up_s,
        "deadline_s": result.deadline_s,
        "settings": result.settings,
        "summary": asdict(figures),
        "figures": {name: finite(each.of(figures)) for name, each in FIGURES.items()},
        "verdicts": [
            {key: getattr(each, key) for key in ("name", "rule", "bound", "met")} | {"measured": finite(each.measured)}
            for each in verdicts
        ],
        "samples": [asdict(one) | {"latency_s": one.latency_s} for one in result.samples],
        "metrics": [
            {"name": name, "labels": dict(labels), "points": points}
            for (name, labels), points in _changes(result).items()
        ],
        "looks": {
            "times": sorted({round(page.at - result.started_at, 3) for page in pages}),
            "errors": [[round(page.at - result.started_at, 3), page.url, page.error] for page in result.series.gaps],
        },
        "plots": {plot.name: f"{plot.name}.png" for plot in drawn},
        "plots_left_out": {left.title: left.why for left in left_out},
    }


def _changes(result: Result) -> Mapping[Key, list[list[float | None]]]:
    """The metrics' values at the times at which they were seen to change."""
    told: dict[Key, list[list[float | None]]] = {}
    here: dict[str, set[Key]] = {}
    for page in result.series.pages:
        if page.error:
            continue
        at = round(page.at - result.started_at, 3)
        labelled = {(name, (*labels, ("page", page.url))): value for (name, labels), value in page.values.items()}
        for key, value in labelled.items():
            points = told.setdefault(key, [])
            number = value if math.isfinite(value) else None
            if not points or points[-1][1] != number:
                points.append([at, number])
        for key in here.get(page.url, set()) - labelled.keys():
            told[key].append([at, None])
        here[page.url] = set(labelled)
    return told
