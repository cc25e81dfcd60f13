"""`tandem bench compare` before it starts anything: what can't be measured is one line that names the option."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve.cli.app import app
from serve.cli.bench_compare import _plan
from serve.errors import OperatorError


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--servers", "lock,celery"], "--servers: tandem must be among them"),
        (["--servers", "tandem,nginx"], "--servers: nginx is not one of tandem, lock, celery, litserve, ray-batch"),
        (["--only", "speed"], "--only: speed is not one of capacity, same-rate, own-rate, overload"),
        (["--threads", "1,x"], "--threads: 1,x is no list of numbers"),
        (["--threads", "1,4096"], "--threads: 4096 threads, and this process may use"),
        (["--check", "/nowhere/ratios.json"], "--check /nowhere/ratios.json: No such file or directory"),
        (["--json", "/nowhere/figures.json"], "--json /nowhere/figures.json: No such file or directory"),
    ],
)
def test_what_cant_be_measured_is_refused_at_once(options: list[str], told: str) -> None:
    done = CliRunner().invoke(app, ["bench", "compare", *options])
    assert isinstance(done.exception, OperatorError)
    assert done.exception.message.startswith(told)


def test_a_check_that_would_measure_nothing_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "ratios.json"
    file.write_text('{"ratios": {"something": {"value": 1, "tolerance": 0}}}')
    done = CliRunner().invoke(app, ["bench", "compare", "--check", str(file)])
    assert isinstance(done.exception, OperatorError)
    assert done.exception.message == f"--check {file}: this run measures none of: something"


def test_what_is_said_goes_before_what_is_quick() -> None:
    full, quick = (_plan(None, None, None, fast, {"rounds": None}) for fast in (False, True))
    assert len(full.servers) == 5
    assert full.rounds == 5
    assert quick.servers == ("tandem", "lock")
    assert quick.rounds == 1
    assert quick.about_s < full.about_s / 4
    said = _plan("tandem,celery", "overload", "1", True, {"rounds": 3, "seconds": 2.0, "deadline_s": 4.0})
    assert (said.servers, said.rounds, said.seconds) == (("tandem", "celery"), 3, 2.0)
    assert said.sections == {"overload"}
    assert said.queued_s == pytest.approx(1.4)  # what is accepted must be drawn within the deadline
    assert _plan(None, "capacity", None, False, {}).capacity_rounds == 5
    assert (full.capacity_rounds, quick.capacity_rounds) == (3, 1)
