"""The chain of a job's stages."""

import dataclasses

import pytest

from serve.domain.jobs import Timings
from serve.domain.text import Tier
from serve.stages import STAGES, explained, stages, wall_s

WHOLE = Timings(
    admission_s=0.01,
    queued_s=0.1,
    claim_s=0.002,
    text_s=0.003,
    text_from=Tier.REDIS,
    batch_s=0.2,
    steps_s=0.5,
    decode_wait_s=0.01,
    decode_s=0.05,
    compress_s=0.02,
    put_s=0.01,
    total_s=0.9,
    told_s=0.001,
    ahead_s=5.0,
    batch_images=2.5,
)


def test_each_stage_is_a_field_in_the_order_of_the_fields() -> None:
    fields = [field.name for field in dataclasses.fields(Timings)]
    assert [f"{name}_s" for name in STAGES] == [
        name for name in fields if name.endswith("_s") and name not in ("total_s", "ahead_s")
    ]


def test_what_a_job_had_not_is_left_out_and_nothing_is_counted_twice() -> None:
    told = stages(WHOLE)
    assert [name for name, _ in told] == [name for name in STAGES if name not in ("retried", "input", "source")]
    assert sum(seconds for _, seconds in told) == pytest.approx(0.906)
    assert wall_s(WHOLE) == pytest.approx(0.911)
    assert explained(WHOLE) == pytest.approx(0.906 / 0.911)


def test_before_its_end_nothing_is_explained() -> None:
    assert explained(Timings(admission_s=0.01, queued_s=1.0)) is None
    assert stages(Timings()) == ()
