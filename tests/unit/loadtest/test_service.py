"""The arithmetic of `tandem bench service`, and its report over figures that are known beforehand."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from loadtest.bench.bare import Drawn
from loadtest.bench.service import Report
from loadtest.bench.service_figures import figures
from loadtest.bench.service_load import USERS, Saturated, Span, Turn, body_of, others_share, sides, work_rate
from loadtest.bench.service_overhead import Exchange, difference, fresh_texts, overhead, stage_medians
from loadtest.bench.service_redis import Count, RedisCosts, cost, rate
from loadtest.bench.service_report import as_json, bars, headline, tables
from loadtest.bench.service_start import memory_of, read_start, starts_of
from loadtest.processes import Use
from serve.bench.machine import Machine
from serve.bench.stats import Spread
from serve.cli.bench_service import environment, read_baseline, service
from serve.cli.options import settings_tree
from serve.domain.jobs import Timings
from serve.domain.orders import ImageRequest
from serve.errors import OperatorError

ORDER = ImageRequest(
    model="shapes", prompt="a red circle", width=128, height=128, num_inference_steps=20, guidance_scale=3.0, seed=7
)
MACHINE = Machine(
    cpu="test", cores=2, memory_bytes=8 << 30, system="Linux", python="3.11", torch="2", threads=1, gpu=None
)


def test_work_counts_as_far_as_it_lies_in_the_window() -> None:
    """Two users. The window is from the second answer (2 s) to when the last order was sent (5 s)."""
    spans = [
        Span(sent_s=0, ended_s=1, weight=10),  # before it
        Span(sent_s=0, ended_s=2, weight=10),  # ends as it begins
        Span(sent_s=1, ended_s=4, weight=30),  # two thirds: 20
        Span(sent_s=2, ended_s=5, weight=6),  # all
        Span(sent_s=4, ended_s=6, weight=8),  # half: 4
        Span(sent_s=5, ended_s=9, weight=100),  # sent as it ends
    ]
    assert work_rate(spans, users=2) == pytest.approx((20 + 6 + 4) / 3)


def test_the_rate_does_not_depend_on_which_orders_the_edges_cut() -> None:
    """A machine that does one unit of work a second, two users: whatever the weights, the rate is 1."""
    weights = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    spans, free, clock = list[Span](), [0.0, 0.0], [0.0, 0.0]
    for weight in weights:
        user = free.index(min(free))
        free[user], clock[user] = free[user] + 2 * weight, free[user]  # each user has half of the machine
        spans.append(Span(sent_s=clock[user], ended_s=free[user], weight=weight))
    assert work_rate(spans, users=2) == pytest.approx(1.0)


def test_a_turn_is_rated_by_what_its_own_orders_weigh() -> None:
    """One user, one order after another, half a unit of work a second; the orders came in another sequence."""
    weights, clock, drawn = [2.0, 1.0, 4.0, 3.0], 0.0, list[Drawn]()
    for _ in range(USERS):
        for index in (3, 0, 2, 1):
            ended = clock + 2 * weights[index]
            drawn.append(Drawn(index=index, sent_s=clock, ended_s=ended, stages={}))
            clock = ended
    turn = Turn(drawn=drawn)
    assert turn.images == 4 * USERS
    assert turn.rate(weights) == pytest.approx(0.5)
    assert Turn(drawn=[]).images == 1  # nothing is divided by none
    with pytest.raises(ValueError, match="0 answers"):
        Turn(drawn=[]).rate(weights)


def test_who_begins_takes_turns_and_the_server_is_first() -> None:
    assert list(sides(3)) == [(0, "tandem"), (0, "bare"), (1, "bare"), (1, "tandem"), (2, "tandem"), (2, "bare")]


def test_too_few_orders_are_no_rate() -> None:
    spans = [Span(sent_s=0, ended_s=1, weight=1), Span(sent_s=0, ended_s=2, weight=1)]
    with pytest.raises(ValueError, match="2 answers of 3 users"):
        work_rate(spans, users=3)
    with pytest.raises(ValueError, match="2 orders are too few for 2 users"):
        work_rate(spans, users=2)


def test_the_others_are_all_but_the_diffusion_replicas() -> None:
    assert others_share({"diffusion": 4.0, "ingress": 0.1, "job redis": 0.06, "raylet": 0.04}) == pytest.approx(0.05)
    assert others_share({"ingress": 1.0}) == float("inf")


def test_a_difference_is_of_the_medians_and_its_spread_of_the_run() -> None:
    shorter = [0.100] * 10
    longer = [0.110, 0.110, 0.110, 0.110, 0.112, 0.112, 0.115, 0.115, 0.120, 0.120]
    found = difference(longer, shorter)
    assert found.median == pytest.approx(0.012)
    assert (found.low, found.high, found.count) == (pytest.approx(0.010), pytest.approx(0.020), 5)
    assert difference([2.0], [1.5]) == Spread(median=0.5, low=0.5, high=0.5, count=1)
    with pytest.raises(ValueError, match="nothing"):
        difference([], [])


def exchange(answered_s: float, **timings: float) -> Exchange:
    return Exchange(answered_s=answered_s, fetched_s=answered_s + 0.002, timings=Timings(**timings))


def test_what_no_stage_holds_is_told_apart() -> None:
    """Admission 2 ms + total 100 ms + told 1 ms: the client waited 5 ms more; the stages leave 3 ms of the server's."""
    one = exchange(0.108, admission_s=0.002, queued_s=0.001, steps_s=0.090, decode_s=0.006, total_s=0.100, told_s=0.001)
    found = stage_medians([one, one, one])
    assert list(found) == ["admission", "queued", "steps", "decode", "told", "between the stages", "proxy and network"]
    assert found["between the stages"] == pytest.approx(0.003)
    assert found["proxy and network"] == pytest.approx(0.005)
    assert sum(found.values()) == pytest.approx(0.108)


def test_redis_costs_are_less_what_an_idle_server_does() -> None:
    """20 trips a second idle, of which the look itself is none. Ten jobs in 5 s: 100 are the clock's, 300 theirs."""

    def count(at_s: float, evalsha: float, time: float, trips: float) -> Count:
        return Count(at_s=at_s, calls={"evalsha": evalsha, "time": time, "info": at_s}, trips=trips)

    idle = {"jobs": rate(count(0, 100, 50, 1000), count(10, 200, 150, 1201))}
    assert idle["jobs"].trips == pytest.approx(20)
    assert idle["jobs"].calls == {"evalsha": 10.0, "time": 10.0}
    before, after = {"jobs": count(10, 200, 150, 1201)}, {"jobs": count(15, 320, 200, 1602)}
    found = cost("wait", 4, 10, 0, before, after, idle)
    assert found.trips == {"jobs": pytest.approx(30)}
    assert found.calls == {"jobs": {"evalsha": pytest.approx(7), "time": pytest.approx(0)}}


def test_growth_is_by_the_step() -> None:
    few = cost("events", 4, 1, 0, *(two_looks(20)), {"jobs": rate(*IDLE)})
    many = cost("events", 50, 1, 0, *(two_looks(112)), {"jobs": rate(*IDLE)})
    assert RedisCosts(idle={}, costs=(few, many)).growth("events") == pytest.approx(2.0)


IDLE = (Count(at_s=0, calls={}, trips=0), Count(at_s=1, calls={}, trips=1))


def two_looks(trips: int) -> tuple[dict[str, Count], dict[str, Count]]:
    return {"jobs": Count(at_s=0, calls={}, trips=0)}, {"jobs": Count(at_s=1, calls={}, trips=trips + 1)}


def use(role: str, started_at: float, **more: Any) -> Use:
    common = {"cpu_s": 0.0, "rss": 1000, "pss": 600, "uss": 500, "fds": 3, "threads": 1, "name": role}
    return Use(role=role, started_at=started_at, **{**common, **more})


LOG = (
    "INFO 2026-11-21 18:41:02,064 serve 1 -- Started Serve in namespace serve.\n"
    "(pid=3) 2026-11-21T18:41:10.555Z INFO serve.diffusion.profiling measured steps of shapes in 2.6 s: 8x8 latents\n"
    "2026-11-21T18:41:15.000Z INFO serve.local ready at http://127.0.0.1:8377, Ctrl-C stops it\n"
)
READY_AT = 1795286475.0
"""Of that last line."""


def test_a_start_is_told_by_phases_that_follow_one_another() -> None:
    began = READY_AT - 15
    marks = {"tandem": 0, "job redis": 2, "cache redis": 2.1, "gcs": 2.5, "controller": 4, "diffusion": 9}
    uses = {number: use(role, began + at) for number, (role, at) in enumerate(marks.items())}
    start = read_start(uses, LOG, began + 16)
    assert start.ready_s == pytest.approx(15)
    assert start.first_image_s == pytest.approx(16)
    assert start.profile_s == 2.6
    assert list(start.phases.values()) == [pytest.approx(each) for each in (2, 0.5, 1.5, 5, 6, 1)]
    assert starts_of([start, start]).ready == Spread(median=start.ready_s, low=15, high=15, count=2)
    silent = read_start(uses, "", began + 16)
    assert silent.ready_s is None
    assert sum(silent.phases.values()) == pytest.approx(16)


def test_memory_is_by_role_and_name_and_adds_up() -> None:
    uses = {1: use("raylet", 0), 2: use("ray (other)", 0, name="ray::IDLE"), 3: use("ray (other)", 0, name="ray::IDLE")}
    found = memory_of(uses)
    assert [(one.role, one.processes, one.pss) for one in found] == [("raylet", 1, 600), ("ray (other)", 2, 1200)]
    assert memory_of({1: use("raylet", 0, pss=None)})[0].pss is None


def test_fresh_texts_never_come_twice() -> None:
    fresh = fresh_texts(["a red circle"], seed=3)
    texts = [fresh() for _ in range(200)]
    assert len(set(texts)) == 200
    again = fresh_texts(["a red circle"], seed=3)
    assert [again() for _ in range(20)] == texts[:20]


def test_an_order_over_http_says_all_that_the_engine_is_told() -> None:
    assert body_of(replace(ORDER, scheduler="ddim")) == {
        "prompt": "a red circle",
        "negative_prompt": "",
        "num_inference_steps": 20,
        "guidance_scale": 3.0,
        "width": 128,
        "height": 128,
        "seed": 7,
        "scheduler": "ddim",
    }
    assert "scheduler" not in body_of(ORDER)  # the model's own


def report(ratio: float = 0.96, added_s: float = 0.012, engine_s: float = 0.150, others: float | None = 0.0) -> Report:
    spread = Spread(median=ratio, low=ratio - 0.01, high=ratio + 0.01, count=5)
    rates = Spread(median=6.0, low=5.9, high=6.1, count=5)
    roles = {"diffusion": engine_s, "ingress": 0.004, "job redis": 0.003}
    exchanges = [exchange(0.1 + added_s, admission_s=0.002, steps_s=0.09, total_s=0.1, told_s=0.001)] * 5
    return Report(
        machine=MACHINE,
        cores=(0, 1),
        torch_threads=1,
        rounds=5,
        seed=0,
        settings={"diffusion": {"max_rows": 16}},
        environ={"RAY_SERVE_ENABLE_HA_PROXY": "1"},
        other_work=others,
        saturated=Saturated(
            users=24,
            in_hand=32,
            orders=192,
            tandem=rates,
            bare=rates,
            ratio=spread,
            others=Spread.of([others_share(roles)]),
            roles=roles,
            threads={"engine and vae": engine_s - 0.01, "the rest": 0.01},
            client=0.002,
            bare_threads={"engine": 0.14, "vae": 0.01},
            idle={"raylet": 0.01},
            failed={},
        ),
        overhead=(overhead(ORDER, "cached", [0.1] * 5, exchanges, [{"steps": 0.09}] * 5),),
        redis=RedisCosts(
            idle={"jobs": rate(*IDLE), "cache": rate(*IDLE)},
            costs=(cost("wait", 4, 1, 0, both(20), both(41), {"jobs": rate(*IDLE), "cache": rate(*IDLE)}),),
        ),
        starts=starts_of([read_start({1: use("tandem", READY_AT - 15)}, LOG, READY_AT + 1)]),
        memory=memory_of({1: use("tandem", 0), 2: use("raylet", 0)}),
        memory_later=memory_of({1: use("tandem", 0, pss=1200), 2: use("raylet", 0)}),
    )


def both(trips: int) -> dict[str, Count]:
    return {name: Count(at_s=trips, calls={"evalsha": trips}, trips=trips) for name in ("jobs", "cache")}


def test_bars_are_met_at_their_edges_and_no_further() -> None:
    assert [bar.met for bar in bars(report())] == [True, True, True, True]
    assert [bar.met for bar in bars(report(ratio=0.949))] == [False, True, True, True]
    assert [bar.met for bar in bars(report(engine_s=0.130))] == [True, False, True, True]
    # 2 ms more with the picture
    assert [bar.met for bar in bars(report(added_s=0.014))] == [True, True, True, False]
    doubted = [bar.doubt for bar in bars(report(ratio=0.90, others=0.2))]
    assert doubted == ["disturbed: other processes took 20% of the processors"] * 4
    assert not any(bar.met for bar in bars(report(others=0.2)))  # the bare engine may be what was slowed down


def printed(one: Report, earlier: dict[str, Any] | None = None) -> str:
    console = Console(file=io.StringIO(), width=160, highlight=False)
    console.print(headline(one))
    for table in tables(one, earlier):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_every_section_is_printed_and_survives_json() -> None:
    told = json.loads(json.dumps(as_json(report())))
    text = printed(report(), told)
    assert "RAY_SERVE_ENABLE_HA_PROXY=1" in text
    assert "diffusion.max_rows=16" in text
    for title in (
        "Mixed work, 24 users always waiting",
        "Where the CPU goes",
        "Inside the processes that draw",
        "One request at a time",
        "Where it goes, median ms",
        "Redis, round trips",
        "Redis, commands",
        "From exec",
        "Memory, MB",
        "Bars",
        "Against the earlier run",
    ):
        assert title in text
    assert "90.00 (90.00)" in text  # steps, and the engine's own


def test_a_run_is_compared_with_an_earlier_one() -> None:
    then, now = figures(as_json(report())), figures(as_json(report(added_s=0.006)))
    assert now["20 steps, cached text: added ms"] / then["20 steps, cached text: added ms"] == pytest.approx(0.5)
    assert now["wait, 4 steps: Redis round trips"] == pytest.approx(2 * (41 - 20 - 1))
    nothing = replace(report(), saturated=None, overhead=(), redis=None, starts=None, memory=(), memory_later=())
    assert figures(as_json(nothing)) == {}


def test_settings_are_groups_and_their_values_yaml() -> None:
    tree = settings_tree(["diffusion.max_rows=16", "diffusion.device=cpu", "cache.int8=true", "data_dir=/a=b"])
    assert tree == {"diffusion": {"max_rows": 16, "device": "cpu"}, "cache": {"int8": True}, "data_dir": "/a=b"}
    for wrong in (["diffusion.max_rows"], ["=3"], ["diffusion=3", "diffusion.max_rows=16"]):
        with pytest.raises(OperatorError, match="--set"):
            settings_tree(wrong)


def test_an_environment_is_not_the_way_to_settings() -> None:
    assert environment(["RAY_SERVE_ENABLE_HA_PROXY=1", "A=b=c"]) == {"RAY_SERVE_ENABLE_HA_PROXY": "1", "A": "b=c"}
    for wrong in (["RAY_SERVE"], ["=1"], ["TANDEM_HTTP__PORT=1"]):
        with pytest.raises(OperatorError, match="--env"):
            environment(wrong)


def test_a_baseline_must_be_one(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    for wrong in ("not JSON", "[]", '{"bars": []}'):
        file.write_text(wrong)
        with pytest.raises(OperatorError, match="not the JSON of `tandem bench service`"):
            read_baseline(file)
    with pytest.raises(OperatorError, match="No such file"):
        read_baseline(tmp_path / "none.json")
    file.write_text(json.dumps(as_json(report())))
    assert figures(read_baseline(file)) == pytest.approx(figures(as_json(report())))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--only", "redis,memory"], "--only: memory is not one of saturated, overhead, redis, start"),
        (["--set", "diffusion.max_rowz=1"], "max_rowz"),
        (["--env", "TANDEM_A=1"], "--env TANDEM_A"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json"),
        (["--baseline", "/nowhere/x.json"], "--baseline /nowhere/x.json"),
    ],
)
def test_what_cannot_be_done_is_one_line(options: list[str], reason: str) -> None:
    app = typer.Typer()
    app.command()(service)
    with pytest.raises(OperatorError, match=reason):
        CliRunner().invoke(app, options, catch_exceptions=False)
