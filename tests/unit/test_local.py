"""What one machine answers of what the settings leave open."""

import pytest

from serve.local import on_this_machine
from serve.placements import HERE
from serve.settings import Settings


@pytest.mark.parametrize(
    ("http", "offered"),
    [
        ({}, True),
        ({"host": "::1"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "0.0.0.0", "benchmark": True}, True),
        ({"benchmark": False}, False),
    ],
)
def test_the_benchmark_is_offered_to_who_sits_at_the_machine(http: dict[str, object], offered: bool) -> None:
    settings = on_this_machine(Settings(http=http))
    assert settings.http.offers_benchmark is offered
    assert settings.http.port == 8000


def test_every_class_is_here() -> None:
    classes = {"small": {"memory_gb": 4, "label": "turing"}, "large": {"memory_gb": 11}}
    found = on_this_machine(Settings(gpu_classes=classes)).gpu_classes
    assert {name: (each.label, each.memory_gb) for name, each in found.items()} == {
        "small": (HERE, 4),
        "large": (HERE, 11),
    }
