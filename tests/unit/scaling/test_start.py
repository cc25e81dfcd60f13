"""What a replica makes of its placement's cold start."""

from serve.jobs.terms import Crew, WorkerReport
from serve.scaling.start import ColdStart


def worker(placement: str, start_s: float) -> WorkerReport:
    return WorkerReport(
        name="w", model="m", placement=placement, max_pixels=64, max_rows=1, batch=1, vae_factor=8, start_s=start_s
    )


def test_the_order_that_woke_it_says_what_it_took() -> None:
    start = ColdStart("p", took_s=8.0)
    assert start.seconds(Crew()) == 8.0, "nothing else is known"
    start.claimed(95.0)
    start.claimed(300.0)
    assert start.seconds(Crew()) == 95.0
    assert start.seconds(Crew(asleep=(worker("p", 40.0),))) == 95.0
    assert start.seconds(Crew(reports=(worker("other", 40.0),))) == 95.0


def test_who_was_not_woken_by_an_order_goes_by_what_was_told() -> None:
    soon = ColdStart("p", took_s=8.0)
    soon.claimed(2.0)  # it was there when the order came
    assert soon.seconds(Crew()) == 8.0
    assert soon.seconds(Crew(asleep=(worker("p", 40.0), worker("other", 70.0)))) == 40.0
    second = ColdStart("p", took_s=8.0)
    second.claimed(500.0)  # it waited behind others: the placement was awake
    assert second.seconds(Crew(reports=(worker("p", 40.0),))) == 40.0
