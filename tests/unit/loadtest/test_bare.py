"""The bare engine with the shipped model, in its own process."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest.bench.bare import Bare
from loadtest.processes import ENGINE, VAE, thread_seconds
from serve.domain.orders import ImageRequest
from serve.errors import OperatorError

pytestmark = pytest.mark.slow

SETTINGS = {"diffusion": {"torch_threads": 1, "profile_s": 0}}
CORES = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (0,)
ORDER = ImageRequest(
    model="shapes", prompt="a red circle", width=128, height=128, num_inference_steps=4, guidance_scale=3.0, seed=7
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    with Bare(SETTINGS, data_dir=tmp_path_factory.mktemp("bare"), cores=CORES[:1], prompts=[ORDER.prompt]) as bare:
        yield bare


def test_an_order_is_timed_from_its_submission_to_its_picture(bare: Bare) -> None:
    drawn = bare.draw(ORDER)
    assert set(drawn.stages) == {"batch", "steps", "decode_wait", "decode"}
    assert 0 < sum(drawn.stages.values()) <= drawn.seconds
    assert drawn.stages["steps"] > 0


def test_a_closed_loop_draws_all_orders_and_keeps_the_users_busy(bare: Bare) -> None:
    orders = [replace(ORDER, seed=seed) for seed in range(12)]
    before = thread_seconds(bare.root.pid)
    drawn = bare.saturate(orders, users=4, in_hand=2)
    after = thread_seconds(bare.root.pid)
    assert sorted(one.index for one in drawn) == list(range(12))
    sent = sorted(one.sent_s for one in drawn)
    ends = sorted(one.ended_s for one in drawn)
    assert sent[3] < ends[0]  # four at once
    assert all(sent[4 + number] >= ends[number] for number in range(8))  # and never a fifth
    assert after[ENGINE] > before.get(ENGINE, 0.0)
    assert VAE in after
    assert bare.root.cpu_affinity() == list(CORES[:1])


def test_weights_are_in_proportion_to_what_orders_take(bare: Bare) -> None:
    short, long, unguided = bare.weights(
        [ORDER, replace(ORDER, num_inference_steps=40), replace(ORDER, guidance_scale=1.0)]
    )
    assert 4 < long / short < 10  # ten times the steps, one decoding
    assert unguided < short


def test_what_it_ends_of_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(OperatorError, match=r"the bare engine ended: .*max_rowz"),
        Bare({"diffusion": {"max_rowz": 1}}, data_dir=tmp_path, cores=CORES, prompts=["a red circle"]),
    ):
        raise AssertionError("it has started")


def test_it_is_gone_when_it_is_left(tmp_path: Path) -> None:
    with Bare(SETTINGS, data_dir=tmp_path, cores=CORES, prompts=[ORDER.prompt]) as bare:
        root = bare.root
        assert root.is_running()
    assert not root.is_running()
