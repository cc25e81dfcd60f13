"""docs/operations: its tables have a row for all that there is, and every test and file that it names is there."""

import re
from pathlib import Path

import pytest
import yaml

from serve.errors import (
    BackendUnavailable,
    DeviceLost,
    GenerationFailed,
    InvalidRequest,
    JobNotFound,
    ModelNotFound,
    NotFinite,
    OutOfMemory,
    TandemError,
)
from serve.jobs.claims import UNREADABLE
from serve.jobs.upkeep import NEVER_STARTED, TIMED_OUT, WORKER_LOST
from serve.prompts.advice import HEAVY
from serve.simulate.fleet import load
from serve.stages import STAGES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "operations"
PAGES = sorted(FOLDER.glob("*.md"))
HELP = (FOLDER / "troubleshooting.md").read_text(encoding="utf-8")
BROKEN: tuple[type[TandemError], ...] = (
    *(BackendUnavailable, DeviceLost, GenerationFailed, InvalidRequest, JobNotFound, ModelNotFound),
    *(NotFinite, OutOfMemory, TandemError),
)
"""With what an attempt may end."""


def rows(title: str) -> list[str]:
    """First cells of the table under a heading, without their quotes or links."""
    section = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", HELP, re.M | re.S)
    assert section is not None
    cells = re.findall(r"^\| (.+?) \|", section[1], re.M)[1:]
    return [re.sub(r"`|\[|\]\(.*?\)", "", cell) for cell in cells]


def test_every_stage_has_a_row() -> None:
    assert rows("Slowness, by stage") == list(STAGES)


def test_every_error_of_a_job_has_a_row() -> None:
    told = {each.code for each in (UNREADABLE, NEVER_STARTED, TIMED_OUT, WORKER_LOST)} | {each.code for each in BROKEN}
    assert set(rows("Jobs that fail")) == told


def test_every_alert_has_a_row() -> None:
    rules = (ROOT / "helm" / "tandem" / "files" / "rules" / "tandem.yaml").read_text(encoding="utf-8")
    alerts = re.findall(r"^ *- alert: (\w+)$", rules, re.M)
    assert len(alerts) > 15
    assert rows("Alerts") == alerts


def test_what_is_said_of_a_heavy_weight() -> None:
    assert f"a weight above {HEAVY:g} (`heavy`)" in HELP


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    named = set(re.findall(r"`((?:tests|helm|serve)/[\w./*-]+)`", page.read_text(encoding="utf-8")))
    for each in named:
        assert list(ROOT.glob(each)), each


def test_the_fleet_of_the_example_is_the_page_s() -> None:
    page = (FOLDER / "sizing.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    assert yaml.safe_load(block) == yaml.safe_load((FOLDER / "fleet.yaml").read_text(encoding="utf-8"))
    fleet = load(FOLDER / "fleet.yaml")
    assert set(fleet.pools) == {"xl", "sd-small", "sd-24gb"}
