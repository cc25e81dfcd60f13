"""What a scenario came to: a row of the table in `docs/reliability.md`, beside the history that it stands for."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from support.history import Accepted, Answer, Entry, Transition, violations, write

from serve.domain import JobState

OUT = Path(os.environ.get("CHAOS_OUT", ".pytest_cache/chaos"))
DOC = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"
_LOST = re.compile(r"is gone|never ended|nobody knows how|succeeded without")
_DOUBLE = re.compile(r"was put \d|ended \d+ times|was settled \d|in two forms|went on after")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`runs` is how often the fault struck. `recovery_s` is the longest time from the last sign of life of a job's last
    claim but one, or from the end of an outage, to the end of a job. `ends` counts the jobs by their end."""

    fault: int
    what: str
    runs: int
    jobs: int
    losses: int
    duplicates: int
    recovery_s: float | None
    ends: dict[str, int]
    note: str = ""


def judged(
    fault: int, what: str, runs: int, history: Sequence[Entry], *, outages: Sequence[float] = (), note: str = ""
) -> Counter[JobState]:
    """Keep history and row, and hold the rules. Gives how many jobs came to which end."""
    found = violations(history)
    ends = Counter(entry.state for entry in history if isinstance(entry, Answer))
    row = Row(
        fault=fault,
        what=what,
        runs=runs,
        jobs=len({entry.job for entry in history if isinstance(entry, Accepted)}),
        losses=sum(1 for line in found if _LOST.search(line)),
        duplicates=sum(1 for line in found if _DOUBLE.search(line)),
        recovery_s=recovery(history, outages),
        ends={str(state): count for state, count in sorted(ends.items())},
        note=note,
    )
    name = f"{fault:02d}-" + re.sub(r"[^a-z0-9]+", "-", what.lower()).strip("-")
    OUT.mkdir(parents=True, exist_ok=True)
    write(OUT / f"{name}.history.jsonl", history)
    (OUT / f"{name}.row.json").write_text(json.dumps(asdict(row)), encoding="utf-8")
    print(line(row))
    assert found == []
    return ends


def unlucky(history: Sequence[Entry], max_attempts: int = 3) -> bool:
    """Who failed lost a worker in each attempt: chance strikes some job three times."""
    failed = [entry for entry in history if isinstance(entry, Answer) and entry.state is JobState.FAILED]
    return all((entry.error, entry.attempt) == ("worker_lost", max_attempts) for entry in failed)


def recovery(history: Sequence[Entry], outages: Sequence[float]) -> float | None:
    streams: dict[str, list[Transition]] = {}
    for entry in history:
        if isinstance(entry, Transition):
            streams.setdefault(entry.job, []).append(entry)
    ends = sorted(stream[-1].at for stream in streams.values())
    took = [
        stream[-1].at - max(entry.at for entry in stream if entry.fence == stream[-1].fence - 1 and entry.state.held)
        for stream in streams.values()
        if stream[-1].fence > 1
    ]
    took += [next(end for end in ends if end > back) - back for back in outages if ends and back < ends[-1]]
    return max(took, default=None)


def line(row: Row) -> str:
    ends = ", ".join(f"{count} {state}" for state, count in row.ends.items())
    back = "" if row.recovery_s is None else f"{row.recovery_s:.1f} s"
    told = f"{row.what}; {row.note}" if row.note else row.what
    return f"| {row.fault} | {told} | {row.runs} | {row.jobs} | {ends} | {row.losses} | {row.duplicates} | {back} |"


def table(rows: Sequence[Row]) -> str:
    head = "| # | fault | times | jobs | ends | lost | doubled | longest recovery |\n|---|---|---|---|---|---|---|---|"
    total = f"| | all | {sum(row.runs for row in rows)} | {sum(row.jobs for row in rows)} | "
    total += f"| {sum(row.losses for row in rows)} | {sum(row.duplicates for row in rows)} | |"
    return "\n".join([head, *(line(row) for row in rows), total])


def machine() -> str:
    names = [
        text.partition(":")[2].strip()
        for text in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if text.startswith("model name")
    ]
    memory = psutil.virtual_memory().total / 2**30
    cores = f"{os.cpu_count()} cores" + (f" ({names[0]})" if names else "")
    return f"{cores}, {memory:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}"


def publish() -> None:
    """Print the table of the rows that are there, and write it into the document."""
    rows = [Row(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(OUT.glob("*.row.json"))]
    if not rows:
        sys.exit(f"no rows under {OUT}")
    told = f"`make chaos` on {machine()}:\n\n{table(rows)}"
    print(told)
    text = DOC.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    DOC.write_text(f"{head}{BEGIN}\n{told}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    publish()
