"""A store that spares the scripts what they have nothing to decide about decides as one that asks them about all."""

import random
from typing import Any

import pytest
from unit.simulate.test_world import fleet, poisson, traffic

from serve.domain.orders import ImageRequest
from serve.jobs.records import Want
from serve.settings.stores import JobSettings
from serve.simulate import world
from serve.simulate.fleet import Fleet
from serve.simulate.outcome import Outcome
from serve.simulate.store import SimulatedStore
from serve.simulate.traffic import Traffic

NOTHING = [Want("no model of this name", 0, 1)]


class Asked(SimulatedStore):
    """Every order is the scripts' from the first moment: somebody asks for something else a little later."""

    def submit(self, now_ms: float, job_id: str, request: ImageRequest, **terms: Any) -> bool:
        queued = super().submit(now_ms, job_id, request, **terms)
        self.claim(now_ms + 1e-3, "nobody", NOTHING, idle=False)
        return queued


def told(found: Outcome) -> list[tuple[Any, ...]]:
    return [(fate.ended, fate.attempts, fate.began_s, fate.done_s) for fate in found.fates]


def crowd(rate: float, count: int) -> Traffic:
    """Of five owners, of whom one orders more than the others."""
    rng, now, lines = random.Random(11), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        lines.append({"due_s": now, "owner": rng.choice("aaaabcde"), "steps": rng.choice((4, 10, 25))})
    return traffic(*lines)


WIDE = {"width": 1536, "height": 1536}
SMALL, LARGE = ({"diffusion": {"max_batch_size": 2, "max_rows": 3, "max_pixels": side**2}} for side in (1024, 1536))


@pytest.mark.parametrize(
    ("own", "orders"),
    [
        (fleet(a={"replicas": 4}), poisson(2.0, 150)),
        (fleet(a={"replicas": 3, "mtbf_h": 0.01, "cold_start_s": 3.0}), crowd(1.5, 200)),
        (
            fleet(a={"replicas": 2, "mtbf_h": 0.005, "cold_start_s": 40.0}, jobs={"queue_ttl_s": 12.0}),
            crowd(1.2, 200),
        ),
        (
            fleet(small=SMALL | {"replicas": 2}, large=LARGE, jobs={"max_queued": 6}),
            traffic(*({"due_s": 0.3 * n, "owner": f"o{n % 5}"} | (WIDE if n % 7 == 0 else {}) for n in range(150))),
        ),
    ],
    ids=["calm", "losses", "losses and old orders", "sizes, owners and a full queue"],
)
def test_every_order_fares_the_same(own: Fleet, orders: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    spared = world.simulate(own, orders, 1)
    monkeypatch.setattr(world, "SimulatedStore", Asked)
    assert told(world.simulate(own, orders, 1)) == told(spared)
    if spared.pools[0].lost:
        assert any(fate.attempts > 1 for fate in spared.fates)


def test_a_lost_job_that_the_scripts_never_heard_of_takes_its_place_and_nobody_elses() -> None:
    assert _order_of_claims(SimulatedStore(JOBS)) == _order_of_claims(Asked(JOBS)) == list("abcdef")


JOBS = JobSettings(lease_s=5.0)
ANY = [Want("sdxl", 0, 10**8)]


def _order_of_claims(store: SimulatedStore) -> list[str]:
    """The worker of `a` is lost while others wait; `d` comes afterwards, of an owner who had nothing yet."""
    _submit(store, 0, "a", "x")
    claimed = store.claim(0, "w", ANY, idle=True)
    assert isinstance(claimed, tuple)
    for now, (job, owner) in enumerate((("b", "y"), ("c", "x"), ("e", "x"), ("f", "y")), 1):
        _submit(store, now, job, owner)
    store.last_sign(10, *claimed[:2])
    _submit(store, 11, "d", "z")
    assert store.reap(5009) == 0
    assert store.reap(5010) == 1
    found = []
    while isinstance(claim := store.claim(5020, f"w{len(found)}", ANY, idle=True), tuple):
        found.append(claim[0])
    return found


def _submit(store: SimulatedStore, now_ms: float, job_id: str, owner: str) -> None:
    (order,) = traffic({"due_s": 0.0}).orders
    assert store.submit(now_ms, job_id, order.request, owner=owner, priority="interactive", cost_ms=1000, replicas=1)
