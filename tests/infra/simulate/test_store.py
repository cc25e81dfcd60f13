"""The job scripts on simulated tables do what they do in a real Redis."""

import random
from pathlib import Path
from typing import Any

from serve.domain.orders import ImageRequest
from serve.embedded import EmbeddedRedis
from serve.jobs.records import Want
from serve.jobs.terms import Hold
from serve.settings.stores import JobSettings
from serve.simulate.calls import StoreCalls
from serve.simulate.measure import MeasuredStore, measure
from serve.simulate.store import SimulatedStore

SETTINGS = JobSettings(max_queued=20, max_queued_s=60.0)
SIDES = (512, 768, 1024)
WANTS = (
    [Want("m", 0, 10**7)],
    [Want("m", 600_000, 10**7), Want("m", 0, 600_000)],
    [Want("m", 0, 300_000)],
    [Want("other", 0, 10**7)],
)


def test_the_same_orders_and_claims_have_the_same_answers(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path, "jobs") as server:
        real = MeasuredStore(SETTINGS, server.url)
        try:
            there = _story(real)
        finally:
            real.close()
    here = _story(SimulatedStore(SETTINGS))
    assert here == there
    assert {True, False, None, Hold.UNFIT} <= {each if not isinstance(each, tuple) else True for each in here}


def _story(store: StoreCalls) -> list[Any]:
    """Orders of four owners, claims for different things, settlements, by the dice; then all that is left."""
    rng, told, held = random.Random(3), [], []
    for number in range(200):
        if rng.random() < 0.55:
            told.append(store.submit(number, f"j{number}", _request(rng), **_terms(rng)))
            continue
        found = store.claim(number, f"w{rng.randrange(3)}", rng.choice(WANTS), idle=not held)
        told.append(found)
        if isinstance(found, tuple):
            held.append(found[:2])
        if held and rng.random() < 0.7:
            told.append(store.settle(number, *held.pop(rng.randrange(len(held)))))
    while isinstance(found := store.claim(400, "w", [*WANTS[0], Want("n", 0, 10**7)], idle=True), tuple):
        told.append(found)
    return [*told, found, store.settle(400, "never", 1)]


def _request(rng: random.Random) -> ImageRequest:
    side = rng.choice(SIDES)
    return ImageRequest(
        model=rng.choice(("m", "m", "m", "n")),
        prompt="",
        width=side,
        height=side,
        num_inference_steps=20,
        guidance_scale=7.0,
        seed=0,
    )


def _terms(rng: random.Random) -> dict[str, Any]:
    return {
        "owner": rng.choice("aaab" + "cd"),
        "priority": rng.choice(("interactive", "interactive", "batch")),
        "cost_ms": rng.choice((500, 1000, 7000)),
        "replicas": 2,
    }


def test_what_scripts_cost_a_redis_is_measured_and_grows_with_what_waits() -> None:
    costs = measure(rounds=8, depth=40)
    assert 1 < costs.empty_us < costs.claim_us
    assert costs.submit_us > 1
    assert costs.claim_us_per_queued > 0.1
    assert costs.submit_us_per_held > 0.1
