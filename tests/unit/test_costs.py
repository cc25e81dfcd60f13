"""Costs: what full steps and lone jobs take by the replicas' reports, how they grow, and what is said without any."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given

from serve.costs import FALLBACK_MS, Costs, Estimate
from serve.domain.orders import ImageRequest
from serve.jobs.terms import REPORT, Crew, StepCurve, WorkerReport

MODEL = "shapes"
SIDES = (64, 96, 128, 192, 256, 384, 512)


def a_curve(ms: Mapping[int, float], side: int = 16) -> StepCurve:
    return StepCurve(height=side, width=side, ms=ms)


def a_report(*curves: StepCurve, **other: object) -> WorkerReport:
    values = {
        "name": "w",
        "model": MODEL,
        "placement": "p",
        "max_pixels": 1 << 20,
        "max_rows": 8,
        "batch": 4,
        "vae_factor": 8,
        "curves": curves,
    } | other
    return WorkerReport(**values)  # type: ignore[arg-type]


def a_request(
    steps: int = 10, images: int = 1, side: int = 128, guidance: float = 5.0, **other: object
) -> ImageRequest:
    values = {
        "model": MODEL,
        "prompt": "",
        "width": side,
        "height": side,
        "num_inference_steps": steps,
        "num_images": images,
        "guidance_scale": guidance,
        "seed": 1,
    } | other
    return ImageRequest(**values)  # type: ignore[arg-type]


def estimate(request: ImageRequest, *reports: WorkerReport) -> Estimate:
    return Costs().estimate(request, Crew(reports))


FLAT = a_report(a_curve({1: 40.0, 8: 40.0}))
"""However many share a step, it takes 40 ms; 8 lanes are the most."""


def test_an_image_costs_its_part_of_a_full_step() -> None:
    assert estimate(a_request(10), FLAT) == Estimate(cost_ms=100, alone_ms=400, replicas=1, known=True)
    assert estimate(a_request(10, images=3), FLAT) == Estimate(cost_ms=300, alone_ms=400, replicas=1, known=True)


def test_a_job_of_more_images_than_a_step_takes_turns_with_itself() -> None:
    assert estimate(a_request(10, images=6), FLAT).alone_ms == 600


def test_without_guidance_a_step_holds_as_many_images_and_half_the_lanes() -> None:
    linear = a_report(a_curve({1: 10.0, 8: 80.0}))
    assert estimate(a_request(10), linear).cost_ms == 200
    assert estimate(a_request(10, guidance=1.0), linear).cost_ms == 100
    assert estimate(a_request(10, guidance=1.0), FLAT).cost_ms == 100  # 4 images, not 8


def test_a_composition_costs_its_lanes() -> None:
    """Two prompts and the negative one are three lanes: of eight, two images share a step."""
    linear = a_report(a_curve({1: 10.0, 8: 80.0}))
    assert estimate(a_request(10, composed=2), linear).cost_ms == 300
    assert estimate(a_request(10, composed=2), FLAT).cost_ms == 200
    many = estimate(a_request(10, composed=15), linear)
    assert (many.cost_ms, many.alone_ms) == (1600, 1600), "more lanes than a step has are made in parts"
    assert estimate(a_request(10, composed=2)).cost_ms == round(10 * 3 * 0.016384 * FALLBACK_MS)


def test_what_is_larger_shares_a_step_with_fewer() -> None:
    linear = a_report(a_curve({1: 10.0, 8: 80.0}))
    assert estimate(a_request(10, side=256), linear).cost_ms == 800
    assert estimate(a_request(10, side=512), linear).cost_ms == 3200


def test_a_shape_that_was_stepped_is_read_where_it_was() -> None:
    report = a_report(a_curve({1: 10.0, 8: 80.0}), a_curve({2: 500.0}, side=32))
    assert estimate(a_request(10, side=256), report).cost_ms == 5000


def test_samplers_that_make_more_forward_passes_cost_them() -> None:
    assert estimate(a_request(10, scheduler="heun"), FLAT).cost_ms == 190
    assert estimate(a_request(10, scheduler="pndm"), FLAT).cost_ms == 110


def test_an_image_to_start_from_saves_steps() -> None:
    assert estimate(a_request(10, image="a/image", strength=0.45), FLAT).cost_ms == 40


def test_decoding_costs_where_it_takes_longer_than_the_steps() -> None:
    decoding = replace(FLAT, decode_ms_per_megapixel=50 / (128 * 128 / 1e6))
    assert estimate(a_request(10), decoding) == Estimate(cost_ms=100, alone_ms=450, replicas=1, known=True)
    assert estimate(a_request(2, images=2), decoding) == Estimate(cost_ms=100, alone_ms=180, replicas=1, known=True)


def test_a_fast_replica_draws_more_of_the_jobs() -> None:
    """One takes 100 ms a job, the other 400: in 400 ms they draw five, so each costs 160 of two replicas' time."""
    slow = a_report(a_curve({1: 160.0, 8: 160.0}))
    assert estimate(a_request(10), FLAT, slow) == Estimate(cost_ms=160, alone_ms=400, replicas=2, known=True)


def test_only_those_that_hold_the_image_count() -> None:
    small = a_report(a_curve({1: 1.0, 8: 1.0}), max_pixels=64 * 64)
    other = a_report(a_curve({1: 1.0, 8: 1.0}), model="another")
    assert estimate(a_request(10), FLAT, small, other) == Estimate(cost_ms=100, alone_ms=400, replicas=1, known=True)


def test_where_nobody_holds_the_image_the_others_of_its_model_are_asked() -> None:
    small = replace(FLAT, max_pixels=64 * 64)
    assert estimate(a_request(10), small) == Estimate(cost_ms=100, alone_ms=400, replicas=1, known=False)


def test_where_nobody_told_a_formula_puts_jobs_in_proportion() -> None:
    expected = round(10 * 2 * 0.016384 * FALLBACK_MS)
    for reports in ((), (a_report(),)):
        assert estimate(a_request(10), *reports) == Estimate(expected, expected, replicas=1, known=False)
    assert estimate(a_request(1, side=8, guidance=0.0)).cost_ms == 1


def test_a_replica_that_has_not_told_yet_counts_as_one() -> None:
    assert estimate(a_request(10), FLAT, a_report()) == Estimate(cost_ms=100, alone_ms=400, replicas=2, known=True)


def test_another_crew_is_read_anew() -> None:
    costs = Costs()
    assert costs.estimate(a_request(10), Crew((FLAT,))).cost_ms == 100
    assert costs.estimate(a_request(10), Crew((a_report(a_curve({1: 80.0, 8: 80.0})),))).cost_ms == 200


@pytest.mark.parametrize("side", [128, 136])
def test_it_is_fast(side: int) -> None:
    curve = {lanes: 10.0 + lanes for lanes in (1, 2, 4, 8, 16)}
    crew = Crew(tuple(a_report(*(a_curve(curve, size) for size in (8, 16, 24, 32)), name=str(i)) for i in range(16)))
    costs, request = Costs(), a_request(images=2, side=side)
    costs.estimate(request, Crew(crew.reports))
    rounds = []
    for _ in range(50):
        began = time.perf_counter()
        costs.estimate(request, crew)
        rounds.append(time.perf_counter() - began)
    assert min(rounds) < 50e-6


step_counts = st.integers(1, 150)
image_counts = st.integers(1, 16)
guidances = st.sampled_from([1.0, 5.0])


@st.composite
def noisy_curves(draw: st.DrawFn, side: int) -> StepCurve:
    lanes = draw(st.sets(st.integers(1, 16), min_size=1, max_size=6))
    return a_curve({each: draw(st.floats(1e-3, 1e5)) for each in lanes}, side)


@st.composite
def reports(draw: st.DrawFn) -> WorkerReport:
    sides = draw(st.sets(st.sampled_from([8, 16, 24, 32, 64]), max_size=4))
    return a_report(
        *(draw(noisy_curves(side)) for side in sides),
        batch=draw(st.integers(1, 8)),
        max_pixels=draw(st.sampled_from([64 * 64, 1 << 20])),
        decode_ms_per_megapixel=draw(st.floats(0, 1e4)),
    )


crews = st.lists(reports(), max_size=4).map(lambda each: Crew(tuple(each)))
requests = st.builds(a_request, step_counts, image_counts, st.sampled_from(SIDES), guidances)


@given(requests, crews)
def test_it_is_a_number_of_milliseconds(request: ImageRequest, crew: Crew) -> None:
    told = Costs().estimate(request, crew)
    assert told.cost_ms >= 1
    assert told.alone_ms >= 1
    assert all(math.isfinite(each) for each in (told.cost_ms, told.alone_ms))
    assert 1 <= told.replicas <= max(1, len(crew.reports))


@given(requests, crews, step_counts)
def test_more_steps_cost_no_less(request: ImageRequest, crew: Crew, steps: int) -> None:
    assume(steps >= request.num_inference_steps)
    costs = Costs()
    less, more = costs.estimate(request, crew), costs.estimate(replace(request, num_inference_steps=steps), crew)
    assert more.cost_ms >= less.cost_ms
    assert more.alone_ms >= less.alone_ms


@given(requests, crews, image_counts)
def test_more_images_cost_no_less_and_each_of_them_the_same(request: ImageRequest, crew: Crew, images: int) -> None:
    assume(images >= request.num_images)
    costs = Costs()
    less, more = costs.estimate(request, crew), costs.estimate(replace(request, num_images=images), crew)
    assert more.cost_ms >= less.cost_ms
    assert more.alone_ms >= less.alone_ms
    parts = images / request.num_images
    assert more.cost_ms == pytest.approx(parts * less.cost_ms, abs=0.5 * parts + 0.5 + (less.cost_ms == 1) * parts)


@given(
    request=requests,
    larger=st.sampled_from(SIDES),
    base=st.floats(0.0, 1e4),
    per_lane=st.floats(1e-2, 1e3),
    cap=st.integers(1, 16),
    batch=st.integers(1, 8),
)
def test_larger_images_cost_no_less_by_the_same_curve(
    request: ImageRequest, larger: int, base: float, per_lane: float, cap: int, batch: int
) -> None:
    assume(larger >= request.width)
    points = sorted({1, (cap + 1) // 2, cap})
    report = a_report(a_curve({lanes: base + per_lane * lanes for lanes in points}), batch=batch)
    less, more = estimate(request, report), estimate(replace(request, width=larger, height=larger), report)
    assert more.cost_ms >= less.cost_ms
    assert more.alone_ms >= less.alone_ms


@given(reports())
def test_a_report_survives_its_journey(report: WorkerReport) -> None:
    assert REPORT.validate_json(REPORT.dump_json(report)) == report
