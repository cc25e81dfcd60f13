"""What scaling wants to know of the settings."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import SecretStr

from serve.jobs.records import outdone
from serve.origins import EnvironmentSecret
from serve.placements import Placement
from serve.relief import memory_mb
from serve.scaling.demand import Place
from serve.scaling.watch import StoreAt


def places_of(placements: Sequence[Placement]) -> list[Place]:
    return [
        Place(
            name=each.name,
            model=each.model,
            max_pixels=each.max_pixels,
            min_replicas=each.settings.least_replicas,
            max_replicas=each.settings.most_replicas,
            target_wait_s=each.settings.target_wait_s,
            outdone_mb=outdone(memory_mb(each)),
        )
        for each in placements
    ]


def store_at(url: SecretStr) -> StoreAt:
    """Where the environment has the URL, its variable's name: what is made of this is kept and shown by Ray."""
    return StoreAt(variable=url.variable) if isinstance(url, EnvironmentSecret) else StoreAt(url=url.get_secret_value())
