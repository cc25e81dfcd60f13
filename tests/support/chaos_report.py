"""What a scenario came to: a row of the table in `docs/reliability.md`, beside the history that it stands for."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
from support.history import Accepted, Answer, Entry, Heard, Transition, violations, write

from serve.domain.jobs import JobState

OUT = Path(os.environ.get("CHAOS_OUT", ".pytest_cache/chaos"))
DOC = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"
_LOST = re.compile(r"is gone|never ended|nobody knows how|succeeded without")
_DOUBLE = re.compile(r"was put \d|ended \d+ times|was settled \d|in two forms|went on after")


SLACK_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`runs` is how often the fault struck. `recovery_s` is the longest time from the last sign of life of a job's last
    claim but one, or from the end of an outage, to the end of a job. `ends` counts the jobs by their end, `unlucky`
    those that failed because each of their attempts lost its worker. `failure` says why the scenario failed."""

    fault: int
    what: str
    runs: int = 0
    jobs: int = 0
    losses: int = 0
    duplicates: int = 0
    recovery_s: float | None = None
    ends: dict[str, int] = field(default_factory=dict)
    unlucky: int = 0
    note: str = ""
    failure: str | None = None
    seed: int = 0
    day: str = ""


class Verdict:
    """On one scenario. Until its test has passed, last assertion and all, its row says that it failed."""

    def __init__(self, fault: int, what: str, seed: int, out: Path = OUT) -> None:
        self._name = f"{fault:02d}-" + re.sub(r"[^a-z0-9]+", "-", what.lower()).strip("-")
        self._out = out
        self._row = Row(fault=fault, what=what, seed=seed, day=datetime.now(UTC).date().isoformat())
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{self._name}.history.jsonl").unlink(missing_ok=True)
        self.failed("it was broken off")

    def of(
        self,
        runs: int,
        history: Sequence[Entry],
        *,
        outages: Sequence[float] = (),
        note: str = "",
        lease_s: float | None = None,
    ) -> Counter[JobState]:
        """Keep the history, and hold the rules. Gives how many jobs came to which end.

        With `lease_s`, where a worker always stayed up, a job of one that was lost ends within the lease, the longest
        run and a little more.
        """
        found = violations(history)
        write(self._out / f"{self._name}.history.jsonl", history)
        answers = [entry for entry in history if isinstance(entry, Answer)]
        ends = Counter(entry.state for entry in answers)
        recovery_s = recovery(history, outages)
        self._row = replace(
            self._row,
            runs=runs,
            jobs=len({entry.job for entry in history if isinstance(entry, Accepted)}),
            losses=sum(1 for line in found if _LOST.search(line)),
            duplicates=sum(1 for line in found if _DOUBLE.search(line)),
            recovery_s=recovery_s,
            ends={str(state): count for state, count in sorted(ends.items())},
            unlucky=sum(entry.error == "worker_lost" for entry in answers),
            note=note,
        )
        assert not found, f"{len(found)} rules broken, of them {found[:3]}"
        if lease_s is not None:
            assert recovery_s is not None, "no claim was lost"
            most_s = lease_s + longest_run_s(history) + SLACK_S
            assert recovery_s <= most_s, f"a recovery took {recovery_s:.1f} s of {most_s:.1f} s"
        return ends

    def passed(self) -> None:
        self._keep(replace(self._row, failure=None))

    def failed(self, reason: str) -> None:
        self._keep(replace(self._row, failure=" ".join(reason.split())[:300].replace("|", "/")))

    def skipped(self) -> None:
        """It says nothing of this machine."""
        (self._out / f"{self._name}.row.json").unlink(missing_ok=True)

    def _keep(self, row: Row) -> None:
        (self._out / f"{self._name}.row.json").write_text(json.dumps(asdict(row)), encoding="utf-8")
        if row.failure is None:
            print(line(row))


def unlucky(history: Sequence[Entry], max_attempts: int = 3) -> bool:
    """Who failed lost a worker in each attempt: chance strikes some job three times. No worker gave it up."""
    failed = [entry for entry in history if isinstance(entry, Answer) and entry.state is JobState.FAILED]
    gave_up = {entry.job for entry in history if isinstance(entry, Heard) and entry.what == "failed"}
    return all(
        (entry.error, entry.attempt) == ("worker_lost", max_attempts) and entry.job not in gave_up for entry in failed
    )


def streams_of(history: Sequence[Entry]) -> dict[str, list[Transition]]:
    streams: dict[str, list[Transition]] = {}
    for entry in history:
        if isinstance(entry, Transition):
            streams.setdefault(entry.job, []).append(entry)
    return streams


def longest_run_s(history: Sequence[Entry]) -> float:
    """From the claim to the end, of jobs that succeeded."""
    return max(
        stream[-1].at - min(entry.at for entry in stream if entry.fence == stream[-1].fence and entry.state.held)
        for stream in streams_of(history).values()
        if stream[-1].state is JobState.SUCCEEDED
    )


def recovery(history: Sequence[Entry], outages: Sequence[float]) -> float | None:
    streams = streams_of(history)
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
    if row.unlucky:
        ends += f" ({row.unlucky} lost a worker in each attempt)"
    back = "" if row.recovery_s is None else f"{row.recovery_s:.1f} s"
    told = f"{row.what}; {row.note}" if row.note else row.what
    if row.failure is not None:
        told = f"**FAILED** ({row.failure}): {told}"
    return f"| {row.fault} | {told} | {row.runs} | {row.jobs} | {ends} | {row.losses} | {row.duplicates} | {back} |"


def table(rows: Sequence[Row]) -> str:
    head = "| # | fault | times | jobs | ends | lost | doubled | longest recovery |\n|---|---|---|---|---|---|---|---|"
    unlucky = sum(row.unlucky for row in rows)
    total = f"| | all | {sum(row.runs for row in rows)} | {sum(row.jobs for row in rows)} | "
    total += f"{unlucky} lost a worker in each attempt" if unlucky else ""
    total += f" | {sum(row.losses for row in rows)} | {sum(row.duplicates for row in rows)} | |"
    return "\n".join([head, *(line(row) for row in rows), total])


def told_of(rows: Sequence[Row]) -> str:
    """The table, and where it comes from."""
    seeds, days = sorted({row.seed for row in rows}), sorted({row.day for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    failed = sum(row.failure is not None for row in rows)
    verdict = f"**{failed} of {len(rows)} scenarios FAILED.**" if failed else f"All {len(rows)} scenarios passed."
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"several runs, seeds {', '.join(map(str, seeds))}"
    return f"`make chaos` on {machine()}; {when}; {seed}. {verdict}\n\n{table(rows)}"


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
    told = told_of(rows)
    print(told)
    text = DOC.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    DOC.write_text(f"{head}{BEGIN}\n{told}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    publish()
