"""`make soak`: load on the executed chart, and strikes at anything by chance, for SOAK_S seconds; in no other run."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import pytest
from support.executed import a_site
from support.history import violations
from support.soak import Recorder, Striker
from support.soak_report import begin, figures, keep
from support.soak_watch import Watch

SECONDS = float(os.environ.get("SOAK_S") or 3600)
SEED = int(os.environ.get("CHAOS_SEED") or random.randrange(10**6))
PAUSE_S = 3.0
RECORDS_S = 120.0
"""That records and pictures live: so that what grows in Redis is a leak."""
UNLUCKY = 0.05
"""Share of the jobs that may fail because each of three attempts lost its worker."""
LONG_S = 1800.0
"""From so long on memory must be flat, and strikes at least one every STRIKE_S."""
STRIKE_S = 18.0
GROWTH, SLACK_MIB = 0.1, 24.0
"""Of the middle of a kind's memory, from the first third of the time to the last."""

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.chaos,
    pytest.mark.timeout(int(SECONDS) + 900),
    pytest.mark.skipif(sys.platform != "linux", reason="pods have addresses in 127.0.0.0/8 and a first process"),
]


def test_load_and_strikes_at_anything(tmp_path: Path) -> None:
    print(f"CHAOS_SEED={SEED}")
    begin(SEED, SECONDS)
    jobs = {"result_ttl_s": RECORDS_S, "max_queued_s": 1e6}
    with a_site(tmp_path, jobs=jobs) as site, Watch(site) as watch:
        striker = Striker(site, SEED)
        traffic = site.traffic()
        try:
            # The recorder ends last: it reads the jobs that users had under way at the end.
            with Recorder(site, traffic) as recorder, traffic:
                ends_at = time.monotonic() + SECONDS
                while time.monotonic() < ends_at:
                    striker.strike()
                    striker.pause(PAUSE_S)
        except AssertionError as error:
            keep(failure=str(error)[:300])
            raise
        history = recorder.history()
        broken = violations(history)
        found = figures(striker.strikes, history, traffic, watch.uses, striker.outages, broken)
    keep(**found)
    try:
        check(found)
    except AssertionError as error:
        keep(failure=str(error)[:300])
        raise
    keep(failure=None)


def check(found: dict) -> None:
    assert found["violations"] == []
    assert found["ends"].keys() <= {"succeeded", "failed"}
    assert found["ends"].get("failed", 0) == found["unlucky"] <= UNLUCKY * found["jobs"]
    if SECONDS < LONG_S:
        return
    for kind, memory in found["memory"].items():
        assert memory["last_mib"] <= memory["first_mib"] * (1 + GROWTH) + SLACK_MIB, f"the memory of a {kind} grows"
    strikes, least = sum(map(len, found["strikes"].values())), SECONDS / STRIKE_S
    assert strikes >= least, f"{strikes} strikes, {least:.0f} are wanted"
