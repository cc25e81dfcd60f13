"""The plots are pictures of the data: valid files, not blank, other data another picture, and none without data."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.load_results import busy, page, result, sample

from loadtest.report.drawing import LeftOut, Plot, style
from loadtest.report.plots import latency, plots
from loadtest.report.results import Result
from loadtest.report.series import Series
from loadtest.samples import Outcome

ALL = {"latency", "throughput", "stages", "batch", "cache", "queue", "replicas"}


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def run() -> Result:
    return busy(100, 60.0)


@pytest.fixture(scope="module")
def drawn(run: Result) -> tuple[list[Plot], list[LeftOut]]:
    return plots(run)


def test_every_plot_is_a_picture_with_colours_on_it(drawn: tuple[list[Plot], list[LeftOut]]) -> None:
    made, left_out = drawn
    assert {plot.name for plot in made} == ALL
    assert left_out == []
    for plot in made:
        shown = pixels(plot.png)
        assert min(shown.shape[:2]) > 300, plot.name
        assert len(np.unique(shown @ (1, 256, 65536))) > 20, plot.name
        assert (np.ptp(shown, axis=2) > 60).sum() > 500, plot.name
        assert plot.title
        assert plot.caption.endswith(".")


def test_the_same_data_are_the_same_picture_and_others_another(
    run: Result, drawn: tuple[list[Plot], list[LeftOut]]
) -> None:
    slower = replace(
        run, series=Series(), samples=tuple(replace(one, ended_s=one.ended_s + 3.0) for one in run.samples)
    )
    before, after = ({plot.name: plot.png for plot in made} for made in (drawn[0], plots(slower)[0]))
    assert all(before[name] != after[name] for name in after)
    with style():
        assert [plot.png for plot in drawn[0] if plot.name == "latency"] == [getattr(latency(run), "png", None)]


def test_without_metrics_the_jobs_own_reports_are_drawn(run: Result) -> None:
    made, left_out = plots(replace(run, series=Series((page(1.0, error="status 404"),))))
    assert {plot.name for plot in made} == ALL - {"queue", "replicas"}
    assert {left.title: left.why for left in left_out} == {
        "Queue": "no metrics were read",
        "Diffusion replicas": "no metrics were read",
    }


def test_a_plot_without_data_is_left_out_and_says_why() -> None:
    refused = sample(0, outcome=Outcome.REFUSED, status=503)
    made, left_out = plots(result(refused, series=Series((page(1.0),))))
    assert [plot.name for plot in made] == ["throughput"]
    assert {left.title: left.why for left in left_out} == {
        "Latency": "no request was finished",
        "Where a job's time goes": "no job told of its stages",
        "Images a step": "no metrics were read, and no job told what its steps were shared with",
        "Where text came from": "no metrics were read, and no job told of its text",
        "Queue": "none told of a queue",
        "Diffusion replicas": "none told of replicas",
    }
    assert len(plots(result())[1]) == len(ALL)


@pytest.mark.parametrize("ended_s", [0.0, 1e-6, 86_400.0])
def test_one_sample_however_fast_or_slow_has_a_plot(ended_s: float) -> None:
    assert {plot.name for plot in plots(result(sample(ended_s=ended_s)))[0]} == {"latency", "throughput"}
