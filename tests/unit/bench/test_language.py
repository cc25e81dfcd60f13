"""The prompt language, judged on pictures: a few prompts of each effect, through everything but HTTP."""

import pytest

from serve.bench.language import Report, measure, scenes
from serve.bench.language_report import MOST, as_json, passed, tables
from serve.shapes.draw import is_held_out


@pytest.fixture(scope="module")
def report() -> Report:
    return measure(2, lambda _: None)


def test_scenes_were_never_seen_in_training() -> None:
    assert all(is_held_out(each.first, each.shape, each.ground) for each in scenes(20))


def test_every_construct_moves_pictures_as_it_should(report: Report) -> None:
    """Two pictures each; the rates of forty are in docs/prompts.md."""
    assert len(report.effects) >= 13
    right, of = sum(each.right for each in report.effects), sum(each.of for each in report.effects)
    assert right >= MOST * of, {each.what: f"{each.right} of {each.of}" for each in report.effects}
    assert all(each.right for each in report.effects)


def test_a_sweep_over_a_number_encodes_nothing_after_its_first_job(report: Report) -> None:
    assert {each.what: each.others for each in report.sweeps} == {"a weight": 0, "a blend": 0, "a switch's step": 0}
    assert all(each.jobs == 10 and each.first >= 2 for each in report.sweeps)


def test_the_report_says_what_fell_short(report: Report) -> None:
    assert [table.row_count for table in tables(report)] == [len(report.effects), 3]
    assert as_json(report)["passed"] == passed(report)
