"""`tandem loadtest` against a whole server: every dialect of Tandem's, and what the report makes of it."""

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from support.server import Server

from loadtest.driver import drive
from loadtest.samples import Outcome
from loadtest.trace import fetch_catalog, trace
from loadtest.workload import Closed, Poisson, load

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_a_workload_is_run_and_reported(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve.cli", "loadtest", "mixed", "--duration", "5", "--rate", "1"]
    command += ["--target", server.url, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    result = json.loads((tmp_path / "result.json").read_text())
    assert done.returncode == (0 if all(verdict["met"] for verdict in result["verdicts"]) else 1), done.stderr
    assert [sample["outcome"] for sample in result["samples"]] == ["done"] * 5, result["samples"]
    for sample in result["samples"]:
        assert sample["job"]["timings"]["total_s"] > 0, sample["dialect"]
        assert sample["bytes"] > 0
        assert sample["due_s"] <= sample["sent_s"] < sample["ended_s"]
    assert (tmp_path / "report.html").is_file()
    assert len(list(tmp_path.glob("*.png"))) >= 3


def test_every_dialect_of_tandem_s_brings_the_same_picture(server: Server) -> None:
    async def story() -> None:
        catalog = await fetch_catalog(server.url)
        workload = load("long-prompts").model_copy(update={"arrivals": Closed(users=1, orders=1)})
        order = trace(workload, 1, catalog)[0]
        arrivals = [replace(order, index=i, dialect=name) for i, name in enumerate(("wait", "events", "poll"))]
        samples = await drive(server.url, arrivals, users=1)
        assert [sample.outcome for sample in samples] == [Outcome.DONE] * 3, samples
        assert len({sample.bytes for sample in samples}) == 1
        for sample in samples:
            assert sample.job is not None
            assert {cut["field"] for cut in sample.job["truncated"]} >= {"prompt"}, "nothing is cut silently"

    asyncio.run(story())


def test_text_alone_and_who_hangs_up(server: Server) -> None:
    async def story() -> None:
        catalog = await fetch_catalog(server.url)
        embeddings = trace(load("embeddings").at(5.0).lasting(2), 1, catalog)
        samples = await drive(server.url, embeddings)
        assert {sample.outcome for sample in samples} == {Outcome.DONE}, samples
        assert sum((sample.job or {})["cache"]["encoded"] for sample in samples) > 0
        hasty = load("mixed").model_copy(update={"arrivals": Poisson(rate=1.0), "duration_s": 2.0})
        arrivals = [replace(one, dialect="wait", hang_up_s=0.05) for one in trace(hasty, 2, catalog)]
        samples = await drive(server.url, arrivals)
        assert {sample.outcome for sample in samples} == {Outcome.LEFT}
        async with httpx.AsyncClient(base_url=server.url) as http:
            jobs = (await http.get("/v1/jobs", params={"limit": 2})).json()["data"]
            while any(job["state"] not in ("cancelled", "succeeded") for job in jobs):
                jobs = (await http.get("/v1/jobs", params={"limit": 2})).json()["data"]
        assert "cancelled" in {job["state"] for job in jobs}

    asyncio.run(story())
