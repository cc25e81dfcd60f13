"""How long a replica may seem to do nothing."""

import pytest

from serve.health import allowed_s, stall_s
from serve.rungs import Rung
from serve.settings.pools import DiffusionSettings


@pytest.mark.parametrize(
    ("device", "settings", "seconds"),
    [
        ("cuda", {}, 20.0),
        ("mps", {}, 20.0),
        ("cpu", {}, 120.0),
        ("cuda", {"compile": True}, 120.0),
        ("cuda", {"stall_s": 7.0}, 7.0),
        ("cpu", {"stall_s": 7.0, "compile": True}, 7.0),
    ],
)
def test_it_depends_on_the_device_unless_the_operator_says_it(
    device: str, settings: dict[str, object], seconds: float
) -> None:
    assert stall_s(DiffusionSettings(**settings), device) == seconds  # type: ignore[arg-type]


@pytest.mark.parametrize(("rung", "seconds"), [(Rung.SEQUENTIAL_OFFLOAD, 20.0), (Rung.CPU, 120.0)])
def test_a_replica_that_has_left_its_card_has_the_time_of_one_without(rung: Rung, seconds: float) -> None:
    assert stall_s(DiffusionSettings(), "cuda", rung) == seconds


@pytest.mark.parametrize(
    ("known", "seconds"), [([], 20.0), ([3.9, 0.1], 20.0), ([4.1, 0.1], 20.5), ([0.0, 30.0], 150.0)]
)
def test_what_is_known_to_be_slow_may_take_five_times_as_long(known: list[float], seconds: float) -> None:
    assert allowed_s(20.0, *known) == pytest.approx(seconds)


def test_a_hung_gpu_is_told_within_half_a_minute() -> None:
    """The contract: with Serve's health checks every five seconds or so (5.5 at most)."""
    assert stall_s(DiffusionSettings(), "cuda") + 5.5 < 30
