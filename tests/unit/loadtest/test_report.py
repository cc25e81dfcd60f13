"""The report's files: what a person reads, what a machine reads, and that no text of others is more than text."""

import base64
import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from support.load_results import busy, result, sample

from loadtest.report.page import write_report
from loadtest.report.results import Result, summary
from loadtest.report.thresholds import FIGURES, Bound
from loadtest.samples import Outcome
from serve.errors import OperatorError

HOSTILE = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>"
VOID = {"meta", "br", "img", "wbr", "link"}


class Page(HTMLParser):
    """A page's elements and text; fails where one is not closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def run() -> Result:
    bounds = {"p95_s": Bound(at_most=0.001), "throughput_per_s": Bound(at_least=0.1)}
    return replace(busy(100, 60.0), thresholds=bounds)


@pytest.fixture(scope="module")
def folder(run: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mixed"
    assert write_report(run, folder) == folder / "report.html"
    return folder


def test_one_file_holds_it_all_the_verdicts_first(run: Result, folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    told = summary(run)
    pngs = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    shown = [image["src"] or "" for image in page.all("img")]
    assert sorted(base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in shown) == sorted(
        pngs.values()
    )
    assert {link["href"] for link in page.all("a")} == set(pngs)
    assert not page.all("script")
    assert not page.all("link")
    assert all(image["alt"] for image in page.all("img"))
    assert page.all("meta")[1]["name"] == "viewport"
    assert "prefers-color-scheme: dark" in text
    order = ["Verdicts", "Not every threshold is met.", "Figures", "Refusals and errors", "Plots", "The slowest"]
    places = [page.text.index(words) for words in (*order, "The workload as it was run")]
    assert places == sorted(places)
    assert f"{told.requests} requests were due: {told.good} finished within 5 s" in page.text
    assert "refused 503: queue_full" in page.text
    assert "AMD EPYC, 2 cores" in page.text
    assert "repetition: zipf:1.0" in page.text
    slowest = max((one for one in run.counted if one.job), key=lambda one: one.latency_s)
    assert str((slowest.job or {})["id"]) in page.text


def test_verdicts_say_what_was_wanted_and_measured(folder: Path) -> None:
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert f"{FIGURES['p95_s'].what} at most 1 ms" in text
    assert re.findall(r"at (most|least) [\d.]+ \S+ [\d.]+ \S+ (not met|met)", text) == [
        ("most", "not met"),
        ("least", "met"),
    ]


def test_the_json_has_the_keys_that_its_documentation_names(run: Result, folder: Path) -> None:
    from loadtest.report import page

    data = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert page.__doc__ is not None
    named = {
        name.strip(",")
        for line in page.__doc__.splitlines()
        if line.startswith("    ")
        for name in (line if line[4:].count("  ") == 0 else line[:35]).split()
    }
    assert named == set(data) - {"plots_left_out"}
    assert len(data["samples"]) == len(run.samples)
    assert data["samples"][3] == json.loads(
        json.dumps(asdict(run.samples[3]) | {"latency_s": run.samples[3].latency_s})
    )
    assert set(data["figures"]) == set(FIGURES)
    assert data["verdicts"][0] == {
        "name": "p95_s",
        "rule": "at_most",
        "bound": 0.001,
        "measured": data["figures"]["p95_s"],
        "met": False,
    }
    assert data["summary"]["latency"]["p95"] == data["figures"]["p95_s"]
    assert {folder / name for name in data["plots"].values()} == set(folder.glob("*.png"))
    depth = [each for each in data["metrics"] if each["name"] == "tandem_queue_depth"]
    assert depth[0]["labels"]["WorkerId"] == "i"
    values = [value for _, value in depth[0]["points"]]
    assert all(before != after for before, after in pairwise(values))
    assert len(data["looks"]["errors"]) == len(run.series.gaps)


def test_text_of_others_is_text_and_nothing_else(tmp_path: Path) -> None:
    hostile = result(
        sample(0, outcome=Outcome.FAILED, status=200, detail=HOSTILE),
        sample(
            1, dialect=HOSTILE, job={"id": HOSTILE, "attempt": HOSTILE, "timings": {"total_s": 1.0, "steps_s": 0.9}}
        ),
        workload=HOSTILE,
        target=f"http://{HOSTILE}",
        machine=HOSTILE,
        settings={"name": HOSTILE, HOSTILE: [HOSTILE]},
    )
    page = Page(write_report(hostile, tmp_path).read_text(encoding="utf-8"))
    assert page.text.count(HOSTILE) >= 8
    assert not page.all("script")
    assert all(set(image) == {"alt", "src"} for image in page.all("img"))


def test_a_run_without_anything_has_a_report(tmp_path: Path) -> None:
    text = Page(write_report(result(), tmp_path).read_text(encoding="utf-8")).text
    assert "The workload has no thresholds." in text
    assert "0 requests were due" in text
    assert "No plot “Latency”: no request was finished." in text
    assert json.loads((tmp_path / "result.json").read_text())["figures"]["p95_s"] is None


def test_a_percentile_among_requests_that_got_nothing_is_never_and_null(tmp_path: Path) -> None:
    lost = [sample(n, outcome=Outcome.LATE, status=0) for n in range(3)]
    run = result(sample(9), *lost, sample(10, hangs_up=True), thresholds={"p50_s": Bound(at_most=1e9)})
    text = Page(write_report(run, tmp_path).read_text(encoding="utf-8")).text
    assert "at most 1000000000.0 s never not met" in text
    assert "all pictures 4 never never never never" in text
    assert "1 more were to hang up early" in text
    told = json.loads((tmp_path / "result.json").read_text())
    assert told["figures"]["p50_s"] is None
    assert told["verdicts"][0]["measured"] is None
    assert told["summary"]["latency"] == {"count": 4, "p50": None, "p95": None, "p99": None, "worst": None}


def test_a_folder_that_can_t_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OperatorError, match="file: "):
        write_report(result(), tmp_path / "file")


def test_an_unknown_figure_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="no figure is called speed"):
        write_report(result(thresholds={"speed": Bound(at_least=1)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
