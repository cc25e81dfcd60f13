"""Reports: what a replica tells of its steps, and the pace at which predicted milliseconds pass there."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from serve.costs import Costs
from serve.diffusion.curves import Curve
from serve.diffusion.profile import Profile
from serve.domain.orders import ImageRequest
from serve.jobs.terms import REPORT, Crew, StepCurve
from serve.placements import Placement
from serve.reports import LEAST_PACE, MOST_PACE, REPORTED_POINTS, Pace, cost_here, report_of
from serve.settings.pools import DiffusionSettings

PLACEMENT = Placement(
    name="a card",
    model="shapes",
    gpu_class="big",
    settings=DiffusionSettings(max_batch_size=8, max_rows=12),
    max_pixels=1 << 20,
)
MEASURED = [Curve((16, 16), {1: 10.0, 2: 12.0, 4: 16.0, 8: 24.0, 16: 80.0}, cap=8)]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Replica:
    """A pace on a clock that the test moves; four images fill a step."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.pace = Pace(lambda: 4, self.clock)

    def serve(self, key: str, cost_ms: int, took_s: float, *, rows: int = 4, drawn: bool = True) -> None:
        self.pace.began(key, rows, lambda: cost_ms)
        self.clock.now_s += took_s
        self.pace.ended(key, drawn)


@pytest.fixture
def replica() -> Replica:
    return Replica()


def curves_of(profile: Profile) -> dict[tuple[int, int], dict[int, float]]:
    report = report_of("w", PLACEMENT, profile, 8, Pace(lambda: 8))
    return {(each.height, each.width): dict(each.ms) for each in report.curves}


def test_a_report_says_who_where_and_how_much() -> None:
    report = report_of("w", PLACEMENT, Profile(8, MEASURED), 8, Pace(lambda: 8))
    assert (report.name, report.model, report.placement, report.gpu_class) == ("w", "shapes", "a card", "big")
    assert (report.max_pixels, report.max_rows, report.batch, report.vae_factor) == (1 << 20, 12, 8, 8)
    assert report.pace == 1.0


def test_measured_steps_are_told_up_to_the_most_lanes_of_a_step() -> None:
    assert curves_of(Profile(8, MEASURED)) == {(16, 16): {1: 10.0, 2: 12.0, 4: 16.0, 8: 24.0}}
    assert curves_of(Profile(3, MEASURED))[(16, 16)] == {1: 10.0, 2: 12.0, 4: 16.0, 6: 20.0}


def test_what_ran_out_of_memory_is_told() -> None:
    profile = Profile(8, MEASURED)
    profile.limit((16, 16), 8)
    assert max(curves_of(profile)[(16, 16)]) == profile.lanes((16, 16)) == 6


def test_learned_steps_are_told() -> None:
    profile = Profile(8, MEASURED)
    profile.learn((16, 16), 4, 26.0)
    profile.learn((32, 32), 2, 90.0)
    told = curves_of(profile)
    assert told[(16, 16)][4] == 17.0
    assert told[(32, 32)] == {2: 90.0}


def test_a_profile_that_knows_nothing_tells_nothing() -> None:
    assert curves_of(Profile(8)) == {}


def test_what_was_learned_alone_is_told_in_proportion() -> None:
    profile = Profile(8)
    profile.learn((16, 16), 2, 10.0)
    assert curves_of(profile) == {(16, 16): {2: 10.0, 16: 80.0}}


def test_a_report_is_small_whatever_was_learned() -> None:
    profile = Profile(64, [Curve((16, 16), {lanes: 1234.56789 + lanes for lanes in range(1, 129)}, cap=128)])
    for side in range(1, 300):
        for lanes in range(1, 12):
            profile.learn((side, 2 * side), lanes, 1234.56789 * lanes)
    report = report_of("n" * 100, PLACEMENT, profile, 8, Pace(lambda: 8))
    assert len(REPORT.dump_json(report)) < 4096
    assert sum(len(each.ms) for each in report.curves) <= REPORTED_POINTS
    assert StepCurve(height=16, width=16, ms=report.curves[0].ms) == report.curves[0]
    assert (299, 598) in {(each.height, each.width) for each in report.curves}


def test_the_pace_is_that_of_a_full_replica(replica: Replica) -> None:
    assert replica.pace.pace == 1.0
    for number in range(60):
        replica.serve(str(number), cost_ms=1000, took_s=2.0)
    assert replica.pace.pace == pytest.approx(2.0, abs=0.02)
    for number in range(240):
        replica.serve(str(number), cost_ms=1000, took_s=0.5)
    assert replica.pace.pace == pytest.approx(0.5, abs=0.2)


def test_little_work_moves_it_little(replica: Replica) -> None:
    replica.serve("a", cost_ms=10, took_s=0.03)
    assert replica.pace.pace == pytest.approx(1.0, abs=0.02)


def test_a_half_idle_replica_tells_nothing_of_the_pace(replica: Replica) -> None:
    for number in range(100):
        replica.serve(str(number), cost_ms=100, took_s=10.0, rows=3)
    assert replica.pace.pace == 1.0


def test_time_between_jobs_is_nobodys(replica: Replica) -> None:
    for number in range(100):
        replica.serve(str(number), cost_ms=1000, took_s=1.0)
        replica.clock.now_s += 100
    assert replica.pace.pace == pytest.approx(1.0)


def test_a_job_that_was_not_drawn_takes_its_time_with_it(replica: Replica) -> None:
    for number in range(50):
        replica.pace.began("drawn", 2, lambda: 1000.0)
        replica.serve(str(number), cost_ms=1000, took_s=2.0, rows=2, drawn=False)
        replica.pace.ended("drawn", True)
    assert replica.pace.pace == pytest.approx(1.0)


def test_a_job_counts_for_the_time_in_which_the_replica_was_full(replica: Replica) -> None:
    """Half of its time is spent alone: half of its cost is what the full time brought about."""
    for _ in range(50):
        replica.pace.began("long", 2, lambda: 1000.0)
        replica.clock.now_s += 1
        replica.serve("short", cost_ms=500, took_s=1.0, rows=2)
        replica.pace.ended("long", True)
    assert replica.pace.pace == pytest.approx(1.0)


def test_a_step_that_has_become_slower_is_in_the_cost_and_not_in_the_pace(replica: Replica) -> None:
    """Steps take twice as long from the middle of the first job on, and the curves have learned so by its end."""
    costs = iter([1000.0, 2000.0, 2000.0, 2000.0])
    for key, took_s in (("a", 1.5), ("b", 2.0)):
        replica.pace.began(key, 4, lambda: next(costs))
        replica.clock.now_s += took_s
        replica.pace.ended(key, True)
    assert replica.pace.pace == pytest.approx(1.0)


def test_a_job_that_can_not_be_predicted_tells_nothing_of_the_pace(replica: Replica) -> None:
    replica.serve("a", cost_ms=0, took_s=100.0)
    assert replica.pace.pace == 1.0


@given(
    side=st.sampled_from([64, 128, 136, 256]),
    steps=st.integers(1, 50),
    images=st.integers(1, 12),
    guidance=st.sampled_from([1.0, 5.0]),
    learned=st.floats(20.0, 90.0),
)
def test_a_replica_predicts_what_its_report_predicts(
    side: int, steps: int, images: int, guidance: float, learned: float
) -> None:
    profile, pace = Profile(8, MEASURED), Pace(lambda: 8)
    if side == 128:  # what was learned of one size is told of it alone
        profile.learn((16, 16), 8, learned)
    request = ImageRequest(
        model="shapes",
        prompt="",
        width=side,
        height=side,
        num_inference_steps=steps,
        num_images=images,
        guidance_scale=guidance,
        seed=1,
    )
    told = Costs().estimate(request, Crew((report_of("w", PLACEMENT, profile, 8, pace),)))
    here = cost_here(profile, 8, pace, request)
    # Both round: the report to four digits, the estimate to whole milliseconds.
    assert abs(told.cost_ms - here) <= 0.51 + 1e-3 * here


def test_unknown_ends_are_passed_over(replica: Replica) -> None:
    replica.pace.ended("nobody", True)
    assert replica.pace.pace == 1.0


def test_the_first_decoding_is_believed_and_the_later_ones_make_a_mean(replica: Replica) -> None:
    replica.pace.decoded(500_000, 0.05)
    assert replica.pace.decode_ms_per_megapixel == pytest.approx(100)
    replica.pace.decoded(1_000_000, 0.2)
    assert replica.pace.decode_ms_per_megapixel == pytest.approx(150)
    replica.pace.decoded(1_000_000, 600.0)  # the machine slept
    assert replica.pace.decode_ms_per_megapixel <= 300
    for _ in range(100):
        replica.pace.decoded(1_000_000, 0.07)
    assert replica.pace.decode_ms_per_megapixel == pytest.approx(70, rel=0.01)


@given(
    st.lists(
        st.tuples(st.integers(1, 8), st.integers(1, 10**6), st.floats(0, 1e4), st.booleans(), st.booleans()),
        max_size=40,
    )
)
def test_whatever_happens_the_pace_stays_within_bounds(story: list[tuple[int, int, float, bool, bool]]) -> None:
    replica = Replica()
    for number, (rows, cost_ms, took_s, drawn, stays) in enumerate(story):
        if stays:
            replica.pace.began(f"stays {number}", rows, lambda cost_ms=cost_ms: cost_ms)
        replica.serve(str(number), cost_ms, took_s, rows=rows, drawn=drawn)
        replica.pace.decoded(rows, took_s)
        assert LEAST_PACE <= replica.pace.pace <= MOST_PACE
        assert 0 <= replica.pace.decode_ms_per_megapixel < float("inf")
