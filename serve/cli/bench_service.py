"""`tandem bench service`: what the service costs over the bare engine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from serve.cli.bench import check_writable, named, show, write
from serve.cli.extras import loadtest as part
from serve.cli.extras import want
from serve.cli.options import Assignments, settings_tree
from serve.cli.running import run
from serve.errors import OperatorError
from serve.settings.tree import ENV_PREFIX

_SECTIONS = ("saturated", "overhead", "redis", "start")
_FULL: Mapping[str, Any] = {"rounds": 5, "orders": 192, "pairs": 100, "jobs": 20, "idle_s": 10.0, "starts": 3}
_QUICK: Mapping[str, Any] = {"rounds": 2, "orders": 60, "pairs": 10, "jobs": 4, "idle_s": 3.0, "starts": 1}
_REPORT = ("as_json", "headline", "tables")


def service(
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Turns of each side, saturated.", show_default="5; with --quick 2")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="torch threads of the denoiser.", show_default="all cores but one")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Fixes the orders.")] = 0,
    assignments: Assignments = None,
    environ: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="RAY_SERVE_... of the server; repeatable.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="SECTION,...", help="Sections to run.", show_default="all")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="About four minutes: few images.")] = False,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON of an earlier run to print the ratios to.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON.")] = None,
) -> None:
    """Measure what the service costs over the bare engine on the same cores: saturated throughput and CPU by process,
    one request on an idle system and where its time goes, Redis round trips of a job, memory and start.

    Exit code 1 when an order failed.
    """
    if json_file is not None:
        check_writable(json_file)
    want("locust")  # of the process that sends the orders
    sections: Sequence[str] = named(only, _SECTIONS, _SECTIONS, "--only")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    given = settings_tree(assignments or ())
    variables = environment(environ or ())
    earlier = read_baseline(baseline) if baseline is not None else None
    sizes = {**(_QUICK if quick else _FULL), **({"rounds": rounds} if rounds else {})}
    plan = part("bench.service:Plan")(
        sections=frozenset(sections),
        cores=tuple(cores),
        torch_threads=threads or max(1, len(cores) - 1),
        seed=seed,
        settings=given,
        environ=variables,
        **sizes,
    )
    report = _measure(plan)
    as_json, headline, tables = (part(f"bench.service_report:{name}") for name in _REPORT)
    if json_file is not None:
        write(json.dumps(as_json(report), indent=2) + "\n", json_file)
    show(headline(report), tables(report, earlier))
    raise typer.Exit(1 if _any_failed(report) else 0)


def environment(assignments: Sequence[str]) -> dict[str, str]:
    """Raises OperatorError naming the option."""
    variables = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise OperatorError(f"--env {assignment}: write NAME=VALUE", "env")
        if name.upper().startswith(ENV_PREFIX):
            raise OperatorError(f"--env {name}: the server of a bench hears no {ENV_PREFIX}*; take --set", "env")
        variables[name] = value
    return variables


def read_baseline(file: Path) -> dict[str, Any]:
    """The JSON of an earlier run. Raises OperatorError naming the option where it is none."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        part("bench.service_figures:figures")(told)
    except OSError as error:
        raise OperatorError(f"--baseline {file}: {error.strerror}", "baseline") from None
    except (ValueError, KeyError, TypeError):
        raise OperatorError(f"--baseline {file}: not the JSON of `tandem bench service`", "baseline") from None
    assert isinstance(told, dict)
    return told


def _measure(plan: Any) -> Any:
    with Console(stderr=True).status("") as status:
        began = time.monotonic()

        def tell(what: str) -> None:
            line = f"{time.monotonic() - began:4.0f} s: {what}"
            status.update(line)
            if not status.console.is_terminal:
                status.console.print(line, markup=False, highlight=False)

        return run(part("bench.service:measure")(plan, tell))


def _any_failed(report: Any) -> bool:
    saturated, redis = report.saturated, report.redis
    return bool(saturated and saturated.failed) or bool(redis and any(cost.failed for cost in redis.costs))
