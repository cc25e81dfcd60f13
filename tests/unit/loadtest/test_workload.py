"""Workloads as YAML: those that come with Tandem, and what is said of a wrong one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from loadtest.report.thresholds import FIGURES
from loadtest.workload import Closed, Part, Poisson, Workload, load, names
from serve.errors import OperatorError

ROOT = Path(__file__).parents[3]
LEAST = "description: one\narrivals: {process: poisson, rate: 2}\n"


def test_every_workload_that_is_promised_is_there_and_says_whose_traffic_it_is() -> None:
    promised = {"mixed", "burst", "diurnal", "dialects", "seed-sweep", "unique", "long-prompts", "hang-ups"}
    promised |= {"embeddings", *(f"zipf-{a}" for a in ("0.6", "0.8", "1.0"))}
    promised |= {f"overload-{times}x" for times in (2, 5, 10)}
    assert set(names()) == promised
    for name in names():
        workload = load(name)
        assert workload.name == name
        assert workload.thresholds, name
        assert set(workload.thresholds) <= set(FIGURES)
    assert load("overload-5x").load == 5
    assert load("seed-sweep").users == 8


def test_what_is_not_written_has_a_default(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(LEAST)
    workload = load(file)
    assert (workload.name, workload.deadline_s, dict(workload.dialects)) == ("my", 10, {"wait": 1})
    assert workload.images.steps[0] == 4
    assert workload.arrivals == Poisson(rate=2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("sped: 1", "sped: Extra inputs are not permitted"),
        ("deadline_s: soon", "deadline_s: Input should be a valid number"),
        ("deadline_s: -1", "deadline_s: Input should be greater than 0"),
        ("arrivals: {process: poisson}", "arrivals: write either rate or load"),
        ("arrivals: {process: poisson, rate: 1, load: 1}", "arrivals: write either rate or load"),
        ("arrivals: {process: poisson, rate: 0}", "arrivals.rate: Input should be greater than 0"),
        ("arrivals: {process: tide, rate: 1}", "arrivals: "),
        ("arrivals: {process: burst, rate: 1, on_s: 5}", "arrivals.off_s: Field required"),
        ("arrivals: {process: closed, users: 0, orders: 5}", "arrivals.users: "),
        ("dialects: {shout: 1}", "dialects.shout: Input should be 'wait', 'events', "),
        ("dialects: {wait: -1}", "dialects.wait: Input should be greater than 0"),
        ("prompts: {positive: {repetition: zipf, texts: 9}}", "prompts.positive.a: Field required"),
        ("prompts: {empty_negative: 2}", "prompts.empty_negative: "),
        ("images: {steps: []}", "images.steps: "),
        ("images: {sizes: [[128, 0]]}", "images.sizes.0.1: "),
        ("images: {sizes: large}", "images.sizes: "),
        ("images: {guidance: {low: 9, high: 2}}", "images.guidance: low is above high"),
        ("hang_ups: {share: 0.5, after_s: [2, 1]}", "hang_ups: after_s must be [shortest, longest]"),
        ("thresholds: {goodness: {at_least: 1}}", "thresholds: no figure is called goodness"),
        ("thresholds: {p95_s: 3}", "thresholds.p95_s: "),
        ("warm_up_s: 60", "warm_up_s (60) must be below duration_s (60)"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_and_the_key(tmp_path: Path, change: str, told: str) -> None:
    file = tmp_path / "my.yaml"
    key = change.partition(":")[0]
    file.write_text("".join(line for line in LEAST.splitlines(True) if not line.startswith(f"{key}:")) + change + "\n")
    with pytest.raises(OperatorError) as caught:
        load(file)
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith(f"{file}: {told}"), caught.value.message


def test_what_is_no_workload_is_one_line_too(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"workload nothing: there are burst, .* or name a \.yaml file"):
        load("nothing")
    with pytest.raises(OperatorError, match=r"absent.yaml: No such file"):
        load(tmp_path / "absent.yaml")
    for text in ("a: [", "- mixed", ""):
        (tmp_path / "my.yaml").write_text(text)
        with pytest.raises(OperatorError, match=r"my\.yaml: ") as caught:
            load(tmp_path / "my.yaml")
        assert "\n" not in caught.value.message


def test_a_load_is_a_multiple_of_a_capacity_and_a_rate_is_itself() -> None:
    workload = load("overload-5x")
    assert workload.for_capacity(3.0).arrivals == Poisson(rate=15.0)
    assert workload.at(2.0).load is None
    assert workload.at(2.0).for_capacity(9.0).arrivals == Poisson(rate=2.0)
    assert workload.lasting(50).duration_s == 50
    with pytest.raises(OperatorError, match="--rate: seed-sweep is a closed loop"):
        load("seed-sweep").at(1.0)
    warm = Workload(description="", arrivals=Closed(users=1, orders=1), warm_up_s=5, name="slow")
    with pytest.raises(OperatorError, match="--duration: slow warms up for 5 s"):
        warm.lasting(5)


def test_docs_tell_every_key_as_the_code_does() -> None:
    page = (ROOT / "docs" / "loadtest.md").read_text(encoding="utf-8")
    table = page.partition("| key | default | what it says |\n|---|---|---|\n")[2].partition("\n\n")[0]
    told = {line.split("`")[1]: line for line in table.splitlines()}
    wanted = dict(keys(Workload))
    assert set(told) == set(wanted)
    for key, description in wanted.items():
        assert description in told[key], f"{key}: {description}"
    assert all(f"`{name}`" in page for name in (*FIGURES, *names()))


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key that a workload may have, with its description."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", " ".join((field.description or "").split())
        for part in groups(field.annotation):
            yield from keys(part, f"{prefix}{name}.")


def groups(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, Part):
        yield kind
    for inner in get_args(kind):
        yield from groups(inner)
