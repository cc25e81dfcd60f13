"""Reused predictions: which they may be, what they cost in the batch, and that the image says so."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from serve.diffusion.families.base import Lane
from serve.diffusion.run import Work
from serve.diffusion.runner import Runner
from serve.diffusion.step_cache import StepCache
from serve.domain.conditioning import Phase, Schedule, TextEmbedding
from serve.encoders.export import conditioning_at

MakeWork = Callable[..., Work]


class Passes:
    """Counts the lanes of every forward pass of a runner's family."""

    def __init__(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lanes: list[int] = []
        predict = runner.family.predict

        def counted(lanes: Sequence[Lane]) -> torch.Tensor:
            self.lanes.append(len(lanes))
            return predict(lanes)

        monkeypatch.setattr(runner.family, "predict", counted)


def drawn(runner: Runner, works: Sequence[Work]) -> tuple[list[np.ndarray], list[tuple[str, ...]]]:
    """The first image of each, all stepping together, and what each is labelled with."""
    rows = {}
    for work in works:
        row = runner.rows(work)[0]
        runner.begin(row, work, None)
        rows[row] = row.steps
    while left := [row for row, steps in rows.items() if steps]:
        assert not runner.step(left)
        rows.update({row: rows[row] - 1 for row in left})
    labels = [runner.approximate(row) for row in rows]
    return [np.asarray(runner.decode(runner.release(row)), dtype=int) for row in rows], labels


def test_the_first_two_and_the_last_are_always_made() -> None:
    cache = StepCache(threshold=1.0, forwards=5)
    same = torch.ones(1, 4, 8, 8)
    made = []
    for _ in range(5):
        drift = cache.drift(same)
        made.append(drift is None)
        if drift is None:
            cache.made(same, same)
        else:
            assert cache.reusable(float(drift))
            cache.reuse(same, float(drift))
    assert made == [True, True, False, False, True]
    assert cache.reuses == 2


def test_changes_add_up_until_the_threshold() -> None:
    cache = StepCache(threshold=0.25, forwards=100)
    latents = torch.ones(1, 4, 8, 8)
    for _ in range(2):
        cache.made(latents, latents)
        latents = latents * 1.1
    reused = 0
    while cache.reusable(drift := float(cache.drift(latents))):
        cache.reuse(latents, drift)
        latents = latents * 1.1
        reused += 1
    assert reused == 2
    assert not cache.reusable(float("nan"))


def test_a_line_is_followed_to_its_next_point_and_no_further() -> None:
    cache = StepCache(threshold=10.0, forwards=100)
    ones = torch.ones(1, 4, 8, 8)
    cache.made(100 * ones, 5 * ones)
    cache.made(101 * ones, 6 * ones)
    assert torch.allclose(cache.reuse(102 * ones, 1 / 200), 6.5 * ones)
    assert torch.allclose(cache.reuse(103 * ones, 1.0), 7 * ones)


def test_a_new_start_is_made_twice_whatever_was_before() -> None:
    cache = StepCache(threshold=10.0, forwards=100)
    ones = torch.ones(1, 4, 8, 8)
    for value in (1.0, 2.0, 3.0):
        cache.made(ones, value * ones)
    assert cache.drift(ones) is not None
    cache.restart()
    made = [100.0, 101.0]
    for value in made:
        assert cache.drift(ones) is None
        cache.made(ones * value, value * ones)
    assert cache.drift(102 * ones) is not None
    assert torch.allclose(cache.reuse(102 * ones, 1 / 200), 101.5 * ones), "the line is the new text's alone"


def switching(work: MakeWork, name: str, every: int, **parameters: object) -> Work:
    """A job whose text is another after every so many steps."""
    parameters |= {"num_inference_steps": 24, "width": 64, "height": 64}
    job, other = work(name, **parameters), work(name, "a green star on black", **parameters)
    ours, theirs = (conditioning_at(each.schedule, 0) for each in (job, other))
    assert ours.negative is not None
    texts = tuple(TextEmbedding(context) for context in (ours.positive, theirs.positive, ours.negative))
    phases = tuple(
        Phase(first, ((1.0, ((1.0, number % 2),)),), ((1.0, 2),)) for number, first in enumerate(range(0, 24, every))
    )
    return replace(job, schedule=Schedule(texts, phases))


def test_no_prediction_serves_another_text(runner: Runner, work: MakeWork, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is new at every step, or at every other, leaves nothing to reuse."""
    passes = Passes(runner, monkeypatch)
    for every in (1, 2):
        jobs = [switching(work, f"{every} {value}", every, step_cache=value) for value in (0.0, 1.0)]
        (exact, cached), labels = drawn(runner, jobs)
        assert labels == [(), ()]
        assert np.abs(exact - cached).max() <= 1
    assert passes.lanes == [4] * 48


def test_a_switch_is_made_and_the_step_after_it(
    runner: Runner, work: MakeWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threshold leaves out all that may be: the first two of each text remain, and the last."""
    passes = Passes(runner, monkeypatch)
    made: list[int] = []
    job = switching(work, "switch", 8, step_cache=1e9)
    row = runner.rows(job)[0]
    runner.begin(row, job, None)

    for step in range(24):
        before = len(passes.lanes)
        assert not runner.step([row])
        made += [step] * (len(passes.lanes) - before)
    assert made == [0, 1, 8, 9, 16, 17, 23]
    assert runner.approximate(row) == ("step_cache",)
    runner.drop([row])


def test_reused_predictions_take_no_lanes(runner: Runner, work: MakeWork, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, cached = (work(f"cache-{value}", num_inference_steps=24, step_cache=value) for value in (0.0, 0.1))
    jobs = [exact, cached]
    alone = [drawn(runner, [job])[0][0] for job in jobs]
    passes = Passes(runner, monkeypatch)
    together, labels = drawn(runner, jobs)
    assert labels == [(), ("step_cache",)]
    assert len(passes.lanes) == 24
    assert [*passes.lanes[:2], passes.lanes[-1]] == [4, 4, 4]
    assert 5 <= passes.lanes.count(2) <= 20, "a third to the most of the guided image's passes were left out"
    for image, solo in zip(together, alone, strict=True):
        assert np.abs(image - solo).max() <= 1, "the neighbour was touched"


def test_an_image_is_near_the_exact_one(runner: Runner, work: MakeWork) -> None:
    exact = drawn(runner, [work("exact", num_inference_steps=50)])[0][0]
    cached = drawn(runner, [work("cached", num_inference_steps=50, step_cache=0.05)])[0][0]
    assert np.abs(exact - cached).mean() < 3


def test_what_never_reused_is_exact(runner: Runner, work: MakeWork) -> None:
    """The denoiser's input changes by more than this at every one of so few steps."""
    (exact, cached), labels = drawn(
        runner, [work("exact", num_inference_steps=4), work("cached", num_inference_steps=4, step_cache=0.01)]
    )
    assert labels == [(), ()]
    assert np.abs(exact - cached).max() <= 1


def test_a_batch_of_reuses_makes_no_forward_pass(
    runner: Runner, work: MakeWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(runner, monkeypatch)
    drawn(runner, [work("cached", num_inference_steps=24, step_cache=0.2)])
    assert 4 <= len(passes.lanes) < 18
