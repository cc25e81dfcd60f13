"""From what a client writes to what is drawn: a prompt with a schedule is its plain prompts, at their steps."""

from collections.abc import Callable

import pytest
import torch
from support.by_hand import Composed, by_hand
from support.parity import difference, drawn

from serve.diffusion.run import Work
from serve.diffusion.runner import Runner
from serve.encoders.export import conditioning_at
from serve.errors import InvalidRequest

MakeWork = Callable[..., Work]
CIRCLE, STAR, HEART = "a red circle on blue", "a green star on blue", "a pink heart"
STEPS = 5


@pytest.fixture(scope="module")
def contexts(work: MakeWork) -> dict[str, torch.Tensor]:
    """Of the plain prompts."""
    return {
        text: conditioning_at(work("text", text, guidance_scale=1.0).schedule, 0).positive
        for text in (CIRCLE, STAR, HEART, "")
    }


Shares = tuple[tuple[float, str], ...]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("[a red circle:a green star:2] on blue", lambda step: ((1.0, CIRCLE if step < 2 else STAR),)),
        ("[a red circle:a green star:0.6] on blue", lambda step: ((1.0, CIRCLE if step < 3 else STAR),)),
        ("[a red circle|a green star] on blue", lambda step: ((1.0, (CIRCLE, STAR)[step % 2]),)),
        ("[a red circle:a green star:0-4] on blue", lambda step: ((1 - step / 4, CIRCLE), (step / 4, STAR))),
        (f'("{CIRCLE}", "{STAR}").blend(3, 1)', lambda step: ((0.75, CIRCLE), (0.25, STAR))),
        (f'("{CIRCLE}", "{STAR}").schedule(2-4)', lambda step: ((1.0, STAR if 2 <= step < 4 else CIRCLE),)),
    ],
    ids=["switch", "share", "alternation", "ramp", "blend", "schedule"],
)
def test_a_schedule_is_its_plain_prompts(
    runner: Runner, work: MakeWork, contexts: dict[str, torch.Tensor], written: str, said: Callable[[int], Shares]
) -> None:
    job = work("written", written, num_inference_steps=STEPS, width=64, height=64)

    def at(step: int) -> tuple[Composed, torch.Tensor]:
        mixed = sum((share * contexts[text] for share, text in said(step)), torch.zeros(1))
        return [(1.0, mixed)], contexts[""]

    assert difference(drawn(runner, job)[0], by_hand(runner, job, at)) <= 1


def test_the_negative_prompt_has_a_schedule_too(
    runner: Runner, work: MakeWork, contexts: dict[str, torch.Tensor]
) -> None:
    job = work("negative", CIRCLE, negative_prompt=f"[:{HEART}:3]", num_inference_steps=STEPS, width=64, height=64)

    def at(step: int) -> tuple[Composed, torch.Tensor]:
        return [(1.0, contexts[CIRCLE])], contexts["" if step < 3 else HEART]

    assert difference(drawn(runner, job)[0], by_hand(runner, job, at)) <= 1


def test_a_composition_is_its_prompts(runner: Runner, work: MakeWork, contexts: dict[str, torch.Tensor]) -> None:
    job = work("and", f"{CIRCLE} AND [{HEART}:{STAR}:2] :0.5", num_inference_steps=STEPS, width=64, height=64)
    assert (job.request.composed, [row.lanes for row in runner.rows(job)]) == (2, [3])

    def at(step: int) -> tuple[Composed, torch.Tensor]:
        return [(1.0, contexts[CIRCLE]), (0.5, contexts[HEART if step < 2 else STAR])], contexts[""]

    assert difference(drawn(runner, job)[0], by_hand(runner, job, at)) <= 1


def test_a_composition_without_guidance_is_refused(runner: Runner, work: MakeWork) -> None:
    """Where its planner doesn't, the engine does."""
    with pytest.raises(InvalidRequest) as refused:
        runner.rows(work("free", f"{CIRCLE} AND {STAR}", guidance_scale=1.0))
    assert refused.value.param == "prompt"
