"""What a soak came to: the table of docs/reliability.md."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from support.chaos_report import machine, recovery
from support.history import Accepted, Answer, Entry
from support.soak import Strike
from support.soak_watch import Use, by, middle, slope
from support.traffic import Traffic

OUT = Path(os.environ.get("SOAK_OUT", ".pytest_cache/soak.json"))
DOC = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- soak: begin -->", "<!-- soak: end -->"


def keep(**told: Any) -> None:
    """Beside what was kept before."""
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(kept() | told, indent=1), encoding="utf-8")


def kept() -> dict[str, Any]:
    return json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}


def begin(seed: int, seconds: float) -> None:
    OUT.unlink(missing_ok=True)
    keep(seed=seed, seconds=seconds, day=datetime.now(UTC).date().isoformat(), failure="it was broken off")


def figures(
    strikes: Sequence[Strike],
    history: Sequence[Entry],
    traffic: Traffic,
    uses: Sequence[Use],
    outages: Sequence[float],
    violations: Sequence[str],
) -> dict[str, Any]:
    answers = [entry for entry in history if isinstance(entry, Answer)]
    return {
        "strikes": {
            kind: [each.back_s for each in strikes if each.kind == kind] for kind in sorted({s.kind for s in strikes})
        },
        "jobs": sum(isinstance(entry, Accepted) for entry in history),
        "ends": dict(Counter(str(entry.state) for entry in answers)),
        "unlucky": sum(entry.error == "worker_lost" for entry in answers),
        "again": sum(entry.attempt > 1 for entry in answers),
        "violations": list(violations),
        "repeated": len(traffic.troubles),
        "resumed": traffic.resumed,
        "recovery_s": recovery(history, outages),
        "memory": {kind: memory(each) for kind, each in sorted(by(lambda use: use.kind, uses).items())},
    }


def memory(uses: Sequence[Use]) -> dict[str, Any]:
    """Of one kind of process: the middle of the first and of the last third of the time, and the slope."""
    first, last = uses[0].at, uses[-1].at
    third = (last - first) / 3
    return {
        "processes": len({use.process for use in uses}),
        "first_mib": middle([use.mib for use in uses if use.at <= first + third]),
        "last_mib": middle([use.mib for use in uses if use.at >= last - third]),
        "slope": slope(uses),
    }


def told_of(soak: dict[str, Any]) -> str:
    verdict = "passed" if soak["failure"] is None else f"**FAILED** ({soak['failure']})"
    seconds, day, seed = soak["seconds"], soak["day"], soak["seed"]
    head = f"`make soak` for {seconds:.0f} s on {machine()}; {day}; seed {seed}: {verdict}."
    if "jobs" not in soak:
        return head
    ends = ", ".join(f"{count} {state}" for state, count in sorted(soak["ends"].items()))
    lost = f" ({soak['unlucky']} lost a worker in each attempt)" if soak["unlucky"] else ""
    strikes = sum(map(len, soak["strikes"].values()))
    told = [
        head,
        f"{strikes} strikes, {soak['jobs']} jobs: {ends}{lost}; {soak['again']} took more than one attempt. "
        f"Rules of the history broken: {len(soak['violations'])}. {soak['repeated']} requests were made again, "
        f"{soak['resumed']} event streams taken up again. Longest recovery of a job: {_seconds(soak['recovery_s'])}.",
        "| struck | times | whole again after, middle | longest |\n|---|---|---|---|\n"
        + "\n".join(
            f"| {kind} | {len(back)} | {middle(back):.1f} s | {max(back):.1f} s |"
            for kind, back in soak["strikes"].items()
        ),
        "| memory of | processes | first third | last third | slope in a process |\n|---|---|---|---|---|\n"
        + "\n".join(
            f"| {kind} | {each['processes']} | {each['first_mib']:.0f} MiB | {each['last_mib']:.0f} MiB | "
            f"{'' if each['slope'] is None else format(each['slope'], '+.0f') + ' MiB/h'} |"
            for kind, each in soak["memory"].items()
        ),
    ]
    return "\n\n".join(told)


def _seconds(value: float | None) -> str:
    return "none was needed" if value is None else f"{value:.1f} s"


def publish() -> None:
    """Print it, and write it into the document."""
    if not OUT.exists():
        sys.exit(f"nothing under {OUT}")
    told = told_of(kept())
    print(told)
    text = DOC.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    DOC.write_text(f"{head}{BEGIN}\n{told}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    publish()
