"""Texts that change from step to step, are mixed and composed: against a loop by hand, one lane at a time."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from PIL import Image
from support.by_hand import Composed, by_hand, one, with_texts
from support.parity import difference, drawn

from serve.diffusion.families.base import Lane
from serve.diffusion.run import Work
from serve.diffusion.runner import Runner
from serve.domain.conditioning import Mix, Phase
from serve.encoders.export import conditioning_at

MakeWork = Callable[..., Work]

CIRCLE, STAR, HEART, NOTHING = range(4)
SMALL = {"width": 64, "height": 64}
MOVED = 3
"""A difference beyond what two roundings come to."""
PROMPTS = ("a red circle on a blue background", "a green star on black", "a pink heart on white", "")


@pytest.fixture(scope="module")
def texts(work: MakeWork) -> list[torch.Tensor]:
    """The contexts of `PROMPTS`."""
    return [conditioning_at(work("text", prompt, guidance_scale=1.0).schedule, 0).positive for prompt in PROMPTS]


@pytest.mark.parametrize("sampler", [None, "dpmpp_2m_karras", "euler_a", "heun"])
def test_a_switch_is_its_two_halves(
    runner: Runner, work: MakeWork, texts: list[torch.Tensor], sampler: str | None
) -> None:
    """Of the negative text too; steps are the client's, whatever passes a sampler makes of them."""
    job = work("switch", num_inference_steps=6, scheduler=sampler, **SMALL)
    both = with_texts(
        job,
        texts,
        Phase(0, one((1.0, CIRCLE)), ((1.0, NOTHING),)),
        Phase(2, one((1.0, CIRCLE)), ((1.0, HEART),)),
        Phase(3, one((1.0, STAR)), ((1.0, HEART),)),
    )

    def said(step: int) -> tuple[Composed, torch.Tensor]:
        return [(1.0, texts[CIRCLE if step < 3 else STAR])], texts[NOTHING if step < 2 else HEART]

    (image,) = drawn(runner, both)
    assert difference(image, by_hand(runner, job, said)) <= 1
    assert difference(image, by_hand(runner, job, lambda step: said(0))) > MOVED
    assert difference(image, by_hand(runner, job, lambda step: said(5))) > MOVED


def test_phases_that_change_nothing_change_nothing(runner: Runner, work: MakeWork, texts: list[torch.Tensor]) -> None:
    """Those that say the same, those after the last step, and parts without a share, whatever is in them."""
    job = work("same", num_inference_steps=4, scheduler="heun", **SMALL)
    nan, negative = torch.full_like(texts[0], torch.nan), ((1.0, NOTHING),)
    plain, star = Phase(0, one((1.0, CIRCLE)), negative), Phase(4, one((1.0, STAR)), negative)
    nothing = Phase(0, one((0.0, 4), (1.0, CIRCLE)), negative)
    expected = drawn(runner, with_texts(job, texts, plain))[0]
    for phases in ((plain, replace(plain, first=2)), (plain, star), (nothing,)):
        assert difference(drawn(runner, with_texts(job, [*texts, nan], *phases))[0], expected) == 0
    assert difference(drawn(runner, with_texts(job, texts, plain, replace(star, first=1)))[0], expected) > MOVED


def test_a_ramp_is_linear_interpolation(runner: Runner, work: MakeWork, texts: list[torch.Tensor]) -> None:
    job = work("ramp", num_inference_steps=6, **SMALL)
    shares = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    ramp = [
        Phase(step, one((1 - share, CIRCLE), (share, STAR)), ((1 - share, NOTHING), (share, HEART)))
        for step, share in enumerate(shares)
    ]

    def said(step: int) -> tuple[Composed, torch.Tensor]:
        positive, negative = (
            torch.lerp(texts[before], texts[after], shares[step])
            for before, after in ((CIRCLE, STAR), (NOTHING, HEART))
        )
        return [(1.0, positive)], negative

    (image,) = drawn(runner, with_texts(job, texts, *ramp))
    assert difference(image, by_hand(runner, job, said)) <= 1
    assert difference(image, by_hand(runner, job, lambda step: said(0))) > MOVED


def test_shares_need_not_add_up_to_one(runner: Runner, work: MakeWork, texts: list[torch.Tensor]) -> None:
    job = work("blend", num_inference_steps=4, **SMALL)
    blend = with_texts(job, texts, Phase(0, one((1.4, CIRCLE), (-0.6, STAR), (0.4, CIRCLE)), ((0.5, NOTHING),)))
    mixed = 1.8 * texts[CIRCLE] - 0.6 * texts[STAR]
    expected = by_hand(runner, job, lambda step: ([(1.0, mixed)], 0.5 * texts[NOTHING]))
    assert difference(drawn(runner, blend)[0], expected) <= 1


@pytest.mark.parametrize("weights", [(1.0,), (0.5,), (1.0, 1.0), (1.3, -0.4, 0.7)])
def test_a_composition_adds_up_what_each_prompt_changes(
    runner: Runner, work: MakeWork, texts: list[torch.Tensor], weights: Sequence[float]
) -> None:
    job = work("and", num_inference_steps=4, scheduler="dpmpp_2m_karras", **SMALL)
    prompts = [CIRCLE, STAR, HEART][: len(weights)]
    parts = tuple((weight, ((1.0, index),)) for weight, index in zip(weights, prompts, strict=True))
    composed = [(weight, texts[index]) for weight, ((_, index),) in parts]
    (image,) = drawn(runner, with_texts(job, texts, Phase(0, parts, ((1.0, NOTHING),))))
    assert difference(image, by_hand(runner, job, lambda step: (composed, texts[NOTHING]))) <= 1


def test_compositions_that_come_to_one_prompt_are_that_prompt(
    runner: Runner, work: MakeWork, texts: list[torch.Tensor]
) -> None:
    job, negative = work("alone", num_inference_steps=6, **SMALL), ((1.0, NOTHING),)
    (expected,) = drawn(runner, with_texts(job, texts, Phase(0, one((1.0, CIRCLE)), negative)))
    circle, star = ((1.0, CIRCLE),), ((1.0, STAR),)
    for parts in (((1.0, circle), (0.0, star)), ((0.5, circle), (0.5, circle)), ((2.0, circle), (-1.0, circle))):
        (image,) = drawn(runner, with_texts(job, texts, Phase(0, parts, negative)))
        assert difference(image, expected) <= 1, parts
    (other,) = drawn(runner, with_texts(job, texts, Phase(0, ((1.0, circle), (0.5, star)), negative)))
    assert difference(other, expected) > MOVED


def test_the_prompts_of_a_composition_have_schedules(runner: Runner, work: MakeWork, texts: list[torch.Tensor]) -> None:
    """`[circle:star:0-4] AND [heart:nothing:2] :0.5`."""
    job = work("scheduled and", num_inference_steps=5, **SMALL)

    def parts(step: int) -> tuple[tuple[float, Mix], ...]:
        share = min(1.0, step / 4)
        return (1.0, ((1 - share, CIRCLE), (share, STAR))), (0.5, ((1.0, HEART if step < 2 else NOTHING),))

    phases = [Phase(step, parts(step), ((1.0, NOTHING),)) for step in range(5)]

    def said(step: int) -> tuple[Composed, torch.Tensor]:
        composed = [(w, sum((share * texts[i] for share, i in mix), torch.zeros(1))) for w, mix in parts(step)]
        return composed, texts[NOTHING]

    (image,) = drawn(runner, with_texts(job, texts, *phases))
    assert difference(image, by_hand(runner, job, said)) <= 1


@pytest.mark.parametrize("most", [None, 1, 2, 3, 5])
def test_images_of_any_lanes_share_a_step(
    runner: Runner, work: MakeWork, texts: list[torch.Tensor], most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to four lanes each, and the denoiser takes at most so many at a time."""
    negative = ((1.0, NOTHING),)
    circle, star, heart = (((1.0, index),) for index in (CIRCLE, STAR, HEART))
    said: dict[str, tuple[tuple[float, Mix], ...]] = {
        "guided": ((1.0, circle),),
        "three": ((1.0, star), (0.7, heart)),
        "four": ((1.0, heart), (0.5, circle), (-0.3, star)),
    }
    jobs = [
        with_texts(work(name, seed=len(parts), num_inference_steps=4, **SMALL), texts, Phase(0, parts, negative))
        for name, parts in said.items()
    ]
    free = work("free", num_inference_steps=4, guidance_scale=1.0, **SMALL)
    jobs.append(with_texts(free, texts, Phase(0, one((1.0, STAR))), Phase(2, one((0.5, STAR), (0.5, HEART)))))
    expected = [drawn(runner, job)[0] for job in jobs]
    sizes: list[int] = []
    predict = runner.family.predict

    def counted(lanes: Sequence[Lane]) -> torch.Tensor:
        sizes.append(len(lanes))
        return predict(lanes)

    monkeypatch.setattr(runner.family, "predict", counted)
    rows = [runner.rows(job)[0] for job in jobs]
    assert [row.lanes for row in rows] == [2, 3, 4, 1]
    for row, job in zip(rows, jobs, strict=True):
        runner.begin(row, job, None)
    for _ in range(4):
        assert not runner.step(rows, most)
    assert sum(sizes) == 4 * 10
    assert max(sizes) == min(10, most or 10)
    for row, right in zip(rows, expected, strict=True):
        image = runner.decode(runner.release(row))
        assert isinstance(image, Image.Image)
        assert difference(image, right) <= 1, row.run_id


def test_images_of_a_run_may_be_at_different_steps(runner: Runner, work: MakeWork, texts: list[torch.Tensor]) -> None:
    """As the scheduler has them where a run's images don't fit one step: each is where its own steps are."""
    ramp = [Phase(step, one((1 - step / 4, CIRCLE), (step / 4, STAR)), ((1.0, NOTHING),)) for step in range(5)]
    job = with_texts(work("run", num_inference_steps=5, num_images=2, **SMALL), texts, *ramp)
    expected = drawn(runner, job)
    rows = runner.rows(job)
    for row in rows:
        runner.begin(row, job, None)
    for turn in ([0], [0], [0, 1], [1], [0, 1], [0, 1], [1]):
        assert not runner.step([rows[index] for index in turn])
    images = [runner.decode(runner.release(row)) for row in rows]
    for image, right in zip(images, expected, strict=True):
        assert isinstance(image, Image.Image)
        assert difference(image, right) <= 1


def test_an_image_to_start_from_stands_for_the_first_steps(
    runner: Runner, work: MakeWork, texts: list[torch.Tensor]
) -> None:
    """At strength 0.5 of 8 steps the first made is the fifth: what was said before is read by none."""
    grey = Image.new("RGB", (64, 64), "grey")
    job = work("start", num_inference_steps=8, image=grey, strength=0.5, **SMALL)
    negative = ((1.0, NOTHING),)

    def image(*switches: tuple[int, int]) -> Image.Image:
        phases = (Phase(first, one((1.0, index)), negative) for first, index in switches)
        return drawn(runner, with_texts(job, texts, *phases))[0]

    star = image((0, STAR))
    assert difference(image((0, CIRCLE), (4, STAR)), star) == 0
    assert difference(image((0, CIRCLE), (5, STAR)), star) > MOVED


def test_a_text_that_is_the_negative_one_is_no_guidance(
    runner: Runner, work: MakeWork, texts: list[torch.Tensor]
) -> None:
    """As where a ramp or a switch comes to it."""
    job, free = (work("meeting", num_inference_steps=4, guidance_scale=each, **SMALL) for each in (5.0, 1.0))
    meeting = Phase(0, one((0.5, CIRCLE), (0.5, STAR)), ((0.5, STAR), (0.5, CIRCLE)))
    plain = Phase(0, one((0.5, CIRCLE), (0.5, STAR)))
    (image,), (expected,) = (drawn(runner, with_texts(*each)) for each in ((job, texts, meeting), (free, texts, plain)))
    assert difference(image, expected) <= 1
