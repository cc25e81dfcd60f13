"""What a placement holds, by its plan and by what its replicas have found."""

import pytest

from serve.domain.orders import ImageRequest
from serve.errors import InvalidRequest
from serve.fleet import check_replicas, held_pixels, place_info
from serve.jobs.terms import WorkerReport
from serve.placements import Fleet, Placement
from serve.settings.pools import DiffusionSettings

SMALL, LARGE = 1024 * 1024, 2048 * 2048


def two_replicas() -> Placement:
    own = DiffusionSettings(replicas=2)
    return Placement(name="p", model="m", gpu_class=None, settings=own, max_pixels=LARGE)


def a_report(max_pixels: int, name: str = "w", placement: str = "p") -> WorkerReport:
    return WorkerReport(
        name=name, model="m", placement=placement, max_pixels=max_pixels, max_rows=8, batch=8, vae_factor=8
    )


def test_a_replica_that_is_away_may_be_the_one_with_the_larger_card() -> None:
    place, wide = (
        two_replicas(),
        ImageRequest(model="m", prompt="a", width=1536, height=1536, num_inference_steps=1, guidance_scale=1.0, seed=1),
    )
    fleet = Fleet((place,))
    for alive in ([], [a_report(SMALL)], [a_report(SMALL), a_report(SMALL, "x", "another placement")]):
        check_replicas(fleet, wide, alive)
        assert held_pixels(place, alive) == place_info(place, alive).max_pixels == LARGE
    both = [a_report(SMALL), a_report(SMALL, "x")]
    assert held_pixels(place, both) == SMALL
    with pytest.raises(InvalidRequest, match="1536 x 1536"):
        check_replicas(fleet, wide, both)
    check_replicas(fleet, wide, [a_report(SMALL), a_report(LARGE, "x")])
