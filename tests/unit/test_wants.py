"""What a replica would claim next, by what it has in hand."""

import dataclasses
from pathlib import Path

import pytest

from serve.diffusion.profile import Profile
from serve.jobs.records import Want
from serve.models import resolve
from serve.models.denoiser import Denoiser
from serve.placements import Placement
from serve.relief import AGED_S
from serve.settings.pools import DiffusionSettings, ModelSettings
from serve.wants import LEFT_TO_OTHERS_S, batch_of, wants_of

AGED = Want("m", 0, 4096, AGED_S)


def a_placement(*, smaller: int = 0, max_rows: int = 32) -> Placement:
    settings = DiffusionSettings(max_batch_size=4, max_rows=max_rows)
    return Placement(name="a card", model="m", gpu_class=None, settings=settings, max_pixels=4096, smaller=smaller)


@pytest.mark.parametrize("rows", [0, 3])
def test_a_replica_with_a_free_row_wants_large_only_work_before_smaller(rows: int) -> None:
    assert wants_of(a_placement(smaller=1024), rows, 4) == [AGED, Want("m", 1024, 4096), Want("m", 0, 1024)]
    assert wants_of(a_placement(), rows, 4) == [Want("m", 0, 4096)]


@pytest.mark.parametrize("rows", [4, 7])
def test_a_full_replica_wants_only_what_nobody_else_takes(rows: int) -> None:
    """Large-only work too: a sibling of the same class may be idle."""
    large, only = a_placement(smaller=1024, max_rows=8), a_placement(max_rows=8)
    assert wants_of(large, rows, 4) == [
        AGED,
        Want("m", 1024, 4096, LEFT_TO_OTHERS_S),
        Want("m", 0, 1024, LEFT_TO_OTHERS_S),
    ]
    assert wants_of(only, rows, 4) == [Want("m", 0, 4096, LEFT_TO_OTHERS_S)]
    for placement in (large, only):
        assert wants_of(placement, 8, 4) == wants_of(placement, 11, 4) == []


def test_a_replica_is_full_where_its_profile_says_so() -> None:
    assert wants_of(a_placement(), 1, 1) == wants_of(a_placement(), 4, 32) == [Want("m", 0, 4096, LEFT_TO_OTHERS_S)]
    assert wants_of(a_placement(), 0, 1) == wants_of(a_placement(), 1, 2) == [Want("m", 0, 4096)]


def test_a_guided_image_takes_two_entries_of_a_step() -> None:
    guided = resolve(ModelSettings(), Path()).denoiser
    assert guided is not None
    lanes = Profile(8)
    assert _batches(guided, lanes) == (8, 16, 16)
    shape = (guided.default_height // guided.vae_scale_factor, guided.default_width // guided.vae_scale_factor)
    lanes.limit(shape, 8)  # it ran out of memory: six entries from now on
    assert _batches(guided, lanes) == (3, 6, 6)
    lanes.limit(shape, 2)
    assert _batches(guided, lanes) == (1, 1, 1)


def _batches(guided: Denoiser, profile: Profile) -> tuple[int, int, int]:
    plain = dataclasses.replace(guided, default_guidance_scale=1.0)
    embedded = dataclasses.replace(guided, guidance="embedded")
    guided_, plain_, embedded_ = (batch_of(each, profile.lanes) for each in (guided, plain, embedded))
    return guided_, plain_, embedded_
