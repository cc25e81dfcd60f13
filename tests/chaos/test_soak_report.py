"""The soak's figures: a leak is seen whether its process lives or is killed, and a run that broke off says so."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from support import soak_report
from support.soak_report import begin, keep, memory, told_of
from support.soak_watch import Use, slope


def process(name: str, began: float, ends: float, mib: float, leak: float = 0.0) -> Iterable[Use]:
    """Looked at every 5 s; it begins with `mib` and grows by `leak` MiB an hour."""
    times = (began + 5 * look for look in range(int((ends - began) / 5)))
    return [Use("ingress replica", name, at, at - began, mib + leak * (at - began) / 3600) for at in times]


def test_a_process_that_grows_is_told_apart_from_larger_ones_that_come_later() -> None:
    steady = [*process("a", 0, 600, 400), *process("b", 600, 1200, 500)]
    assert slope(steady) == pytest.approx(0)
    assert slope([*steady, *process("c", 0, 1200, 300, leak=60)]) == pytest.approx(60 * 8 / 10, rel=0.2)
    assert slope([*process("a", 0, 1200, 400, leak=60)]) == pytest.approx(60)
    assert slope([*process("a", 0, 50, 400, leak=60)]) is None, "it has not settled"


def test_what_grows_beyond_its_processes_shows_in_the_last_third() -> None:
    lives = [use for n in range(12) for use in process(str(n), 100 * n, 100 * n + 95, 400 + 10 * n)]
    found = memory(lives)
    assert (found["processes"], found["first_mib"], found["last_mib"]) == (12, 420, 500)


def test_a_soak_has_failed_until_it_has_passed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_report, "OUT", tmp_path / "soak.json")
    begin(7, 300)
    assert "300 s" in (told := told_of(soak_report.kept()))
    assert "seed 7: **FAILED** (it was broken off)." in told
    keep(failure=None)
    assert "seed 7: passed." in told_of(soak_report.kept())
