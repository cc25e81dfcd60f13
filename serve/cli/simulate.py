"""`tandem simulate`: a fleet and its traffic, computed with the server's own claim order and policies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve.cli.extras import loadtest as part
from serve.cli.extras import want
from serve.cli.options import AsJson
from serve.errors import OperatorError

if TYPE_CHECKING:
    from serve.memory.terms import ModelShape
    from serve.simulate.answer import Answer
    from serve.simulate.fleet import Fleet
    from serve.simulate.traffic import Traffic

MOST_ORDERS = 20_000


def simulate(
    fleet: Annotated[
        Path | None, typer.Argument(metavar="FLEET.yaml", help="Cards, and what is drawn on them.", show_default=False)
    ] = None,
    trace: Annotated[
        str | None,
        typer.Argument(metavar="TRACE", help="A .jsonl trace, a workload's .yaml or its name.", show_default=False),
    ] = None,
    p95: Annotated[
        float | None,
        typer.Option(min=0.001, max=86_400, metavar="SECONDS", help="How many cards draw 95 % in that time?"),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=1e-6, max=1e6, help="Orders a second of a workload.", show_default="as it says")
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(min=1, max=31 * 86_400, metavar="SECONDS", help="Of a workload.", show_default="as it says"),
    ] = None,
    tenants: Annotated[int, typer.Option(min=1, max=1_000_000, help="Who order in a workload.")] = 20,
    skew: Annotated[
        float, typer.Option(min=0, max=10, help="Tenant k of a workload orders as often as 1 / k**skew.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Fixes all that is left to chance.")] = 0,
    most_orders: Annotated[
        int, typer.Option(min=100, help="Simulate a slice of fleet and traffic where there are more.")
    ] = MOST_ORDERS,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="For result.json and plots.")] = None,
    measure_redis: Annotated[
        bool, typer.Option("--measure-redis", help="Print this machine's `redis:` for a fleet, and exit.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What a fleet makes of a traffic: waiting, use, cost; how many cards it wants; where one job Redis is full.

    No server, GPU or weights are needed. docs/simulate.md says what is computed and what is not.
    """
    if measure_redis:
        _print_redis()
        return
    if fleet is None or trace is None:
        raise OperatorError("simulate: name a FLEET.yaml and a TRACE", "fleet")
    want("lupa")
    from serve.cli.simulate_screen import show
    from serve.simulate.answer import Answer
    from serve.simulate.fleet import load
    from serve.simulate.scale import run
    from serve.simulate.shards import shards
    from serve.simulate.sizing import sizes

    own = load(fleet)
    traffic = _traffic(own, trace, rate, duration, tenants, skew, seed)
    outcome = run(own, traffic, most_orders, seed)
    answer = Answer(
        outcome=outcome,
        shards=shards(own, traffic, outcome, most_orders),
        sizes=list(sizes(own, traffic, p95, most_orders, seed)) if p95 is not None else [],
        p95_s=p95,
    )
    if out is not None:
        _write(answer, out)
    if as_json:
        print(json.dumps(answer.as_json(), indent=2))
    else:
        show(answer)


def _traffic(
    fleet: Fleet, trace: str, rate: float | None, duration: float | None, tenants: int, skew: float, seed: int
) -> Traffic:
    """From a file of orders, or drawn from a workload of `tandem loadtest`. Raises OperatorError."""
    from serve.simulate.traffic import MOST_ORDERS as MOST_TRACED
    from serve.simulate.traffic import made, read

    shapes = _shapes(fleet)
    if trace.endswith(".jsonl"):
        if rate is not None or duration is not None:
            raise OperatorError("--rate and --duration are for workloads: a .jsonl trace has its own", "trace")
        return read(Path(trace), shapes)
    workload = part("workload:load")(trace)
    if workload.users is not None:
        raise OperatorError(f"{workload.name}: a closed loop has no times of its own; name another workload", "trace")
    workload = workload.at(rate) if rate is not None else workload
    workload = workload.lasting(duration) if duration is not None else workload
    if (orders := (workload.rate or 0.0) * workload.duration_s) > MOST_TRACED:
        raise OperatorError(f"{workload.name}: {orders:,.0f} orders are more than {MOST_TRACED:,}", "trace")
    images = workload.images
    if images.model is not None:
        shapes = [each for each in shapes if each.name == images.model]
        if not shapes:
            raise OperatorError(f"{workload.name}: no pool draws {images.model}", "trace")
    return made(
        workload.name,
        part("trace:due_times")(workload, seed),
        workload.duration_s,
        shapes,
        steps=images.steps,
        sizes=() if images.sizes == "presets" else images.sizes,
        unguided=images.guidance.unguided,
        tenants=tenants,
        skew=skew,
        seed=seed,
    )


def _shapes(fleet: Fleet) -> Sequence[ModelShape]:
    """Of the models that are drawn, in the order of the pools. Raises OperatorError where there is none."""
    if not any(pool.most for pool in fleet.pools.values()):
        raise OperatorError("pools: none has replicas", "fleet")
    drawn = {pool.model: name for name, pool in fleet.pools.items() if pool.most}
    return [fleet.shape(name) for name in drawn.values()]


def _write(answer: Answer, out: Path) -> None:
    plots = part("report.simulated:plots")(answer)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_text(json.dumps(answer.as_json(), indent=2) + "\n", encoding="utf-8")
        for plot in plots:
            (out / f"{plot.name}.png").write_bytes(plot.png)
    except OSError as error:
        raise OperatorError(f"--out: {out}: {error.strerror}", "out") from None


def _print_redis() -> None:
    import yaml

    from serve.simulate.measure import measure

    print(yaml.safe_dump({"redis": measure().model_dump()}, sort_keys=False), end="")
