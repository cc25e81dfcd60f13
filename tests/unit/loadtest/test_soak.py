"""What a soak orders, what it sees, and what it makes of it; over looks that are made up."""

import io
import json
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from loadtest.bench.soak import TEXTS, WHOLE_EVERY, End, Plan, Report, check, fates, orders
from loadtest.bench.soak_bars import FEW, bars, findings, steady_from
from loadtest.bench.soak_report import as_json, headline, passed, plot, tables
from loadtest.bench.soak_watch import Judged, Look, RedisUse, judge, judge_stored, own_memory
from loadtest.processes import DIFFUSION, INGRESS, RAY_OTHER, Use
from loadtest.samples import Outcome, Sample
from loadtest.servers import Budget
from serve.bench.machine import this_machine
from serve.errors import OperatorError
from serve.results.png import encode_png
from serve.shapes.draw import draw, sample_scene
from serve.shapes.expectation import of_prompt

MIB = 1024 * 1024
PLAN = Plan(
    images=8000,
    users=4,
    result_ttl_s=20.0,
    every_s=5.0,
    judged_at_once=5,
    seed=3,
    budget=Budget(cores=(0,), torch_threads=1),
)
PIDS = {11: DIFFUSION, 12: INGRESS, 13: RAY_OTHER}
START = RedisUse(keys=4, bytes=MIB)


def use(pid: int, role: str, *, fds: int = 40, threads: int = 20, started_at: float = 1.0) -> Use:
    return Use(
        role=role,
        cpu_s=1.0,
        rss=300 * MIB,
        pss=200 * MIB,
        uss=100 * MIB,
        fds=fds,
        threads=threads,
        name=role,
        started_at=started_at,
    )


def look(number: int, leaks: Mapping[int, float], processes: Mapping[int, Use] | None = None) -> Look:
    """Every 80 images; `leaks` in bytes for each image, by pid, over what an allocator takes and gives back."""
    images = 80 * number
    rng = np.random.default_rng(number)
    own = {pid: int(150 * MIB + leaks.get(pid, 0.0) * images + rng.integers(0, 200_000)) for pid in PIDS}
    return Look(
        at_s=2.0 * number,
        images=images,
        processes=processes or {pid: use(pid, role) for pid, role in PIDS.items()},
        own_bytes=own,
        jobs=RedisUse(keys=500, bytes=3 * MIB + int(rng.integers(0, 50_000)), records=200),
        cache=RedisUse(keys=150, bytes=8 * MIB, bound=8 * MIB),
        result_files=400,
        result_bytes=400_000,
        all_files=420,
        all_bytes=900_000,
    )


def sample(index: int, outcome: Outcome = Outcome.DONE, job: str | None = None, attempt: int = 1) -> Sample:
    told = {"id": job or f"job{index}", "attempt": attempt}
    return Sample(
        index=index, dialect="wait", due_s=0.0, sent_s=0.0, ended_s=1.0, outcome=outcome, status=200, job=told
    )


def report(leaks: Mapping[int, float] | None = None, looks: tuple[Look, ...] | None = None) -> Report:
    samples = [sample(index) for index in range(PLAN.images)]
    judged = [Judged(job=f"job{n}", side=side, prompt="", right=n != 3) for n in range(20) for side in (64, 128)]
    return Report(
        plan=PLAN,
        machine=this_machine(),
        seconds=200.0,
        fates=fates(samples, logged=len(samples)),
        start=replace(look(0, {}), jobs=START, cache=START),
        looks=looks or tuple(look(number, leaks or {}) for number in range(1, 101)),
        gaps=0,
        judged=tuple(judged),
        end=End(waited_s=25.0, records=0, keys=(), orphans=(), result_files=0, jobs=START, cache=START),
        warnings=("2026-11-21T18:30:53.690Z WARNING serve.worker something",),
    )


def missed(made: Report) -> list[str]:
    return [f"{bar.what}: {bar.measured}" for bar in bars(made, findings(made)) if not bar.met]


def test_a_server_that_keeps_what_it_has_passes() -> None:
    made = report()
    assert missed(made) == []
    assert passed(made)


def test_a_process_that_leaks_is_named() -> None:
    made = report({12: 300.0})  # 300 bytes an image: 293 KiB per thousand
    (told,) = missed(made)
    assert told.startswith("memory of every process: growth: 1 of 3 grow, most ingress 12: +")
    (grown,) = (one.memory for one in findings(made).processes if one.pid == 12)
    assert grown is not None
    assert grown.low < 300 * 1000 < grown.high
    assert not passed(made)


def test_what_a_process_takes_at_first_is_no_leak() -> None:
    """100 MB over the first two thousand images, nothing after that."""
    first = tuple(look(number, {11: 52_000.0 * min(1.0, 25 / number)}) for number in range(1, 101))
    assert missed(report(looks=first)) == []


def test_descriptors_that_grow_and_processes_that_were_replaced_are_told() -> None:
    def at(number: int) -> Look:
        processes = {
            11: use(11, DIFFUSION, fds=40 + number // 3),  # 4 per thousand images
            12: use(12, INGRESS, started_at=1.0 if number < 80 else 2.0),  # a new process of the same number
            13: use(13, RAY_OTHER),
        }
        if number < 30:
            processes[14] = use(14, RAY_OTHER)
        return look(number, {}, processes)

    made = report(looks=tuple(at(number) for number in range(1, 101)))
    told = missed(made)
    assert told[0].startswith("descriptors of every process: growth: 1 of 2 grow, most diffusion 11: +4")
    assert told[1].startswith("processes that ended or were replaced: ")
    assert len(told) == 2
    assert {one.role for one in findings(made).passing} == {INGRESS, RAY_OTHER}


def test_growth_that_can_t_be_told_from_noise_is_in_doubt_and_told_with_its_interval() -> None:
    def noisy(number: int) -> Look:
        seen = look(number, {})
        noise = np.random.default_rng(1000 + number).normal(0, 40 * MIB)
        return replace(seen, own_bytes=seen.own_bytes | {12: int(400 * MIB + 6000 * seen.images + noise)})

    made = report(looks=tuple(noisy(number) for number in range(1, 101)))
    (bar,) = (bar for bar in bars(made, findings(made)) if bar.what == "memory of every process: growth")
    assert bar.doubt == "1 of 3 go up and down too much to tell"
    assert not bar.met
    assert re.fullmatch(r"2 of 3 flat, most ingress 12: \+[\d.]+ \(-[\d.]+ to \+[\d.]+\) KiB", bar.measured)


def test_the_cache_redis_may_fill_up_to_its_bound_and_no_further() -> None:
    def at(number: int, bytes_: int, bound: int) -> Look:
        return replace(look(number, {}), cache=RedisUse(keys=1, bytes=bytes_, bound=bound))

    def told(per_look: int, bound: int) -> list[str]:
        return missed(report(looks=tuple(at(n, 1 * MIB + n * per_look, bound) for n in range(1, 101))))

    assert told(50_000, 8 * MIB) == []
    assert told(0, 0) == []
    (line,) = told(50_000, 2 * MIB)
    assert line.startswith("used memory of the cache Redis: most 5,907 of 2,048 KiB; +610.4 (")


def test_a_stored_file_that_is_no_picture_is_told_and_ends_nothing() -> None:
    broken = Judged(job="x", side=0, prompt="", right=False)
    made = replace(report(), judged=(*report().judged, broken))
    assert missed(made) == ["stored files that are no pictures: 1"]


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n and so on", None])
def test_the_watch_tells_a_broken_file_and_goes_on(tmp_path: Path, content: bytes | None) -> None:
    plain = io.BytesIO()
    Image.new("RGB", (64, 64)).save(plain, "PNG")  # without our parameters
    file = tmp_path / "0.png"
    assert judge_stored(file) is None
    file.write_bytes(plain.getvalue() if content is None else content)
    assert judge_stored(file) == Judged(job=tmp_path.name, side=0, prompt="", right=False)


def test_what_is_left_over_is_told() -> None:
    end = End(waited_s=80.0, records=1, keys=("tandem:job:x",), orphans=("y",), result_files=2, jobs=START, cache=START)
    assert missed(replace(report(), end=end)) == [
        "records left after the sweep: 1",
        "keys of the job Redis that were not there at the start: 1",
        "jobs with files but without a record: 1",
        "files in the result store after the sweep: 2",
    ]


def test_pictures_that_are_not_what_was_ordered_are_told() -> None:
    judged = tuple(Judged(job=f"job{n}", side=64, prompt="", right=n % 2 == 0) for n in range(40))
    made = replace(report(), judged=judged)
    assert missed(made)[0] == "64 x 64: background as ordered: 20 of 40"
    assert next(bar for bar in bars(made, findings(made)) if "128" in bar.what).doubt == "no picture was judged"


def test_a_short_run_misses_no_bar_of_growth_but_those_of_its_jobs() -> None:
    short = tuple(look(number, {12: 30_000.0}) for number in range(1, 11))
    few = [sample(index) for index in range(FEW - 1)]
    made = replace(report(looks=short), fates=fates(few, logged=len(few)))
    assert passed(made)
    assert {bar.what for bar in bars(made, findings(made)) if bar.doubt} >= {"memory of every process: growth"}
    failed = fates([*few, sample(FEW, Outcome.FAILED)], logged=FEW)
    assert not passed(replace(made, fates=failed))


def test_fates_tell_orders_that_failed_were_lost_or_doubled() -> None:
    good = [sample(index) for index in range(10)]
    assert fates(good, logged=10).doubled == 0
    assert fates(good, logged=11).doubled == 1  # the server logged an order twice
    assert fates([*good, sample(10, job="job9")], logged=11).doubled == 1  # two clients were given one job
    told = fates([*good, sample(10, Outcome.LATE), sample(11, attempt=2)], logged=12)
    assert (told.failed, told.again, told.doubled) == (1, 1, 0)
    assert told.reasons == {"late: 200": 1}


def test_the_steady_state_begins_when_half_is_drawn_and_records_are_swept() -> None:
    looks = [look(number, {}) for number in range(1, 101)]
    assert looks[steady_from(looks, result_ttl_s=20.0)].images == 4000
    assert looks[steady_from(looks, result_ttl_s=80.0)].at_s == 160.0
    assert steady_from(looks, result_ttl_s=1000.0) == 100


def test_a_run_that_was_over_before_anything_was_swept_says_so() -> None:
    made = replace(report(), plan=replace(PLAN, result_ttl_s=1000.0))
    doubts = [bar.doubt for bar in bars(made, findings(made)) if bar.doubt]
    assert doubts == ["fewer than 4 looks after the caches were full"] * 4


def test_orders_repeat_some_texts_and_say_all_that_the_judge_needs() -> None:
    made = list(orders(replace(PLAN, images=1000)))
    assert made == list(orders(replace(PLAN, images=1000)))
    sides = [one.body["width"] for one in made]
    assert sides.count(128) == 1000 // WHOLE_EVERY
    assert sides.count(64) == 1000 - 1000 // WHOLE_EVERY
    texts = [one.body["prompt"] for one in made]
    assert 500 < len(set(texts)) < 500 + TEXTS
    assert all(of_prompt(text).background for text in texts)
    assert {bool(one.body["negative_prompt"]) for one in made} == {True, False}
    assert len({one.body["seed"] for one in made}) > 990


def test_a_picture_is_held_against_what_its_own_file_says(tmp_path: Path) -> None:
    def stored(name: str, side: int, prompt: str) -> Path:
        scene = sample_scene(np.random.default_rng(5), two=False)
        assert (scene.background, scene.things[0].color) == ("purple", "white")
        file = tmp_path / name / "0.png"
        file.parent.mkdir()
        file.write_bytes(encode_png(Image.fromarray(draw(scene, side)), {"prompt": prompt}))
        return file

    shape = sample_scene(np.random.default_rng(5), two=False).things[0].shape
    assert judge(stored("whole", 128, f"a white {shape} on a purple background")).right
    assert not judge(stored("color", 128, f"a red {shape} on a purple background")).right
    assert judge(stored("small", 64, f"a red {shape} on a purple background")).right
    assert not judge(stored("ground", 64, f"a white {shape} on a green background")).right
    with pytest.raises(FileNotFoundError):
        judge(tmp_path / "swept" / "0.png")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells")
def test_memory_is_what_a_process_asked_for_not_what_it_maps(tmp_path: Path) -> None:
    before = own_memory(os.getpid(), 0)
    taken = bytearray(os.urandom(1) * (64 * MIB))
    assert own_memory(os.getpid(), 0) - before > 60 * MIB
    file = tmp_path / "mapped"
    file.write_bytes(bytes(64 * MIB))
    before = own_memory(os.getpid(), 0)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert not any(mapped[place] for place in range(0, 64 * MIB, 4096))
        assert own_memory(os.getpid(), 0) - before < 4 * MIB
    assert len(taken) == 64 * MIB
    assert own_memory(2**22 + 1, 7) == 7


def test_the_report_has_tables_figures_and_a_plot() -> None:
    made = report({12: 300.0})
    told: dict[str, Any] = json.loads(json.dumps(as_json(made)))
    assert told["bars"][4]["met"] is False
    assert told["settings"]["jobs"]["result_ttl_s"] == 20.0
    console = Console(record=True, width=160, file=io.StringIO())
    for table in tables(made):
        console.print(table)
    text = console.export_text()
    assert "grows" in text
    assert "not met" in text
    assert "8,000 images of 64 x 64" in headline(made)
    assert plot(made).startswith(b"\x89PNG")


def test_fewer_images_than_users_is_refused() -> None:
    with pytest.raises(OperatorError, match="--images: 3 is less than --users 4"):
        check(replace(PLAN, images=3))
