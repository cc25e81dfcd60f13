"""What one machine answers of what the settings leave open."""

import pytest

from serve.local import on_this_machine
from serve.placements import HERE
from serve.settings.tree import Settings


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


@pytest.mark.parametrize(
    ("host", "said", "required"),
    [
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("", None, True),
        ("192.0.2.7", None, True),
        ("0.0.0.0", False, False),
        ("127.0.0.1", True, True),
    ],
)
def test_who_comes_from_elsewhere_needs_a_key(host: str, said: bool | None, required: bool) -> None:
    settings = on_this_machine(Settings(http={"host": host}, keys={"required": said, "salt": True}))
    assert settings.keys.required is required
    assert settings.keys.salt


def test_every_class_is_here() -> None:
    classes = {"small": {"memory_gb": 4, "label": "turing"}, "large": {"memory_gb": 11}}
    found = on_this_machine(Settings(gpu_classes=classes)).gpu_classes
    assert {name: (each.label, each.memory_gb) for name, each in found.items()} == {
        "small": (HERE, 4),
        "large": (HERE, 11),
    }
