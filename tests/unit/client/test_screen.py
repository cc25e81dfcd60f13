"""What a terminal shows while a job waits and runs."""

import asyncio
import io
from typing import Any

import pytest
from rich.console import Console

from serve.cli import screen
from serve.cli.client import Client
from serve.cli.screen import job_bars, ordinal, run_job, span

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("columns", [80, 120])
async def test_a_waiting_job_s_place_and_time_are_told_and_change(
    script: Any, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr(screen, "PLACE_S", 0.1)
    script.places = [13, 13, 3, 3, 3, 1, 1]
    file = io.StringIO()
    console = Console(file=file, width=columns, force_terminal=True, color_system=None)
    async with Client(script.url, poll_s=0.01) as client:
        with job_bars(console) as bars:
            job = await asyncio.wait_for(run_job(client, {"prompt": "x"}, "a large red yellow heart", bars), 20)
    told = file.getvalue()
    assert job.state.value == "succeeded"
    where = [
        told.index(words) for words in ("13th in the queue, about 52 s", "3rd in the queue, about 12 s", "succeeded")
    ]
    assert where == sorted(where)
    assert "a large red" in told


@pytest.mark.parametrize(
    ("number", "word"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (113, "113th")]
)
def test_ordinals(number: int, word: str) -> None:
    assert ordinal(number) == word


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-0.1, "0 s"), (0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "2 h"), (129_600, "2 d")],
)
def test_spans_are_one_number(seconds: float, words: str) -> None:
    assert span(seconds) == words
