from dataclasses import replace

import pytest
import torch

from serve.domain import EncodeUnit
from serve.encoders.codec import pack
from serve.encoders.compose import compose, emphasize
from serve.prompts.plan import PromptPlan, SidePlan, UnitRead


def rows(mean: float) -> torch.Tensor:
    noise = torch.randn(77, 64, generator=torch.Generator().manual_seed(1))
    return noise - noise.mean() + mean


def weights(**at: float) -> tuple[float, ...]:
    return tuple(at.get(f"t{index}", 1.0) for index in range(77))


def test_weights_of_one_change_no_bit() -> None:
    plain = rows(-0.1)
    assert emphasize(plain, weights()) is plain


def test_emphasis_is_a1111s() -> None:
    """Multiply each token, then restore the mean of the row."""
    plain = rows(-0.1)
    weighted = plain.clone()
    weighted[3] *= 1.5
    weighted[4] *= 0.5
    expected = weighted * (plain.mean() / weighted.mean())
    got = emphasize(plain, weights(t3=1.5, t4=0.5))
    assert torch.allclose(got, expected)
    assert got.mean() == pytest.approx(plain.mean().item(), rel=1e-4)


@pytest.mark.parametrize("mean", [0.0, 0.001, -0.005])
@pytest.mark.parametrize("weight", [-1.0, 0.0, 0.5, 1.1, 1.5, 10.0])
def test_a_faint_mean_restores_the_size_instead(mean: float, weight: float) -> None:
    """A quotient of two means near zero would scale the row by noise, even turn its sign."""
    plain = rows(mean)
    got = emphasize(plain, weights(t3=weight, t4=weight))
    assert got.square().mean() == pytest.approx(plain.square().mean().item(), rel=1e-4)
    assert torch.nn.functional.cosine_similarity(got[0], plain[0], dim=0) == pytest.approx(1.0, abs=1e-5)


def test_nothing_left_is_nothing() -> None:
    assert torch.equal(emphasize(rows(-0.1), (0.0,) * 77), torch.zeros(77, 64))


def read(role: str, output: str = "hidden", weights: tuple[float, ...] | None = None, text: int = 1) -> UnitRead:
    return UnitRead(role, EncodeUnit(role, (text,), output), weights)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(plan: PromptPlan, tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """`tensors` by role and output; the negative side's are twice as large."""
    sides = (plan.positive, 1.0), (plan.negative or SidePlan(), 2.0)
    return {
        one.unit.key: pack(tensors[f"{one.role} {one.unit.output}"] * factor)
        for side, factor in sides
        for one in side.reads
    }


def test_a_lone_encoder_is_the_context() -> None:
    value = noise(77, 64)
    plan = PromptPlan(
        family="sd",
        context_width=64,
        positive=SidePlan(((read("clip"),),)),
        negative=SidePlan(((read("clip", text=2),),)),
    )
    got = compose(plan, packed(plan, {"clip hidden": value}))
    assert torch.equal(got.positive, value)
    assert torch.equal(got.negative, 2 * value)
    assert (got.pooled, got.negative_pooled, got.time_ids) == (None, None, None)
    alone = compose(replace(plan, negative=None), packed(plan, {"clip hidden": value}))
    assert alone.negative is None


def test_sdxl_lies_side_by_side_and_its_empty_negative_is_zeros() -> None:
    first, second, vector = noise(77, 48, seed=1), noise(77, 80, seed=2), noise(20, seed=3)
    side = SidePlan(((read("l", "skip:1"), read("g", "skip:1")),), (read("g", "projected:x"),))
    plan = PromptPlan(
        family="sdxl",
        context_width=128,
        positive=side,
        negative=SidePlan(zero=True),
        time_ids=(64, 96, 0, 0, 64, 96),
    )
    got = compose(plan, packed(plan, {"l skip:1": first, "g skip:1": second, "g projected:x": vector}))
    assert torch.equal(got.positive, torch.cat([first, second], 1))
    assert torch.equal(got.pooled, vector)
    assert torch.equal(got.negative, torch.zeros(77, 128))
    assert torch.equal(got.negative_pooled, torch.zeros(20))
    assert got.time_ids.tolist() == [64, 96, 0, 0, 64, 96]
    assert got.time_ids.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sd3_pads_its_clips_and_puts_t5_below(dtype: torch.dtype) -> None:
    first, second, t5 = (
        noise(77, 24, dtype=dtype),
        noise(77, 40, seed=1, dtype=dtype),
        noise(9, 96, seed=2, dtype=dtype),
    )
    vectors = noise(20, seed=3, dtype=dtype), noise(28, seed=4, dtype=dtype)
    clips = (read("l", "skip:1"), read("g", "skip:1"))
    side = SidePlan((clips, (read("t5"),)), (read("l", "projected:x"), read("g", "projected:y")))
    plan = PromptPlan(family="sd3", context_width=96, positive=side)
    tensors = {"l skip:1": first, "g skip:1": second, "t5 hidden": t5}
    tensors |= dict(zip(("l projected:x", "g projected:y"), vectors, strict=True))
    got = compose(plan, packed(plan, tensors))
    above = torch.cat([first, second, torch.zeros(77, 32, dtype=dtype)], 1)
    assert torch.equal(got.positive, torch.cat([above, t5]).float())
    assert torch.equal(got.pooled, torch.cat(vectors).float())
    assert got.positive.dtype is got.pooled.dtype is torch.float32
    without = replace(plan, positive=replace(side, blocks=(clips,)), zero_rows=9)
    assert torch.equal(compose(without, packed(plan, tensors)).positive, torch.cat([above, torch.zeros(9, 96)]).float())


def test_each_encoders_context_is_weighted_by_itself() -> None:
    """A1111's rule restores the mean of what one encoder gave, not that of the whole context."""
    first, second = rows(-0.1), rows(0.3)
    side = SidePlan(((read("l", "skip:1", weights(t3=1.5)), read("g", "skip:1", weights(t4=0.5))),))
    plan = PromptPlan(family="sdxl", context_width=128, positive=side)
    got = compose(plan, packed(plan, {"l skip:1": first, "g skip:1": second})).positive
    assert torch.equal(got[:, :64], emphasize(first, weights(t3=1.5)))
    assert torch.equal(got[:, 64:], emphasize(second, weights(t4=0.5)))


def test_weights_are_exact_in_half_precision() -> None:
    """The arithmetic is float32's, whatever the encoder ran in."""
    value = rows(-0.1).bfloat16()
    plan = PromptPlan(family="sd", context_width=64, positive=SidePlan(((read("clip", weights=weights(t3=1.5)),),)))
    got = compose(plan, packed(plan, {"clip hidden": value})).positive
    assert torch.equal(got, emphasize(value.float(), weights(t3=1.5)))
    assert not torch.equal(got, got.bfloat16().float())


def test_a_missing_unit_is_an_error() -> None:
    with pytest.raises(KeyError):
        compose(PromptPlan(family="sd", context_width=64, positive=SidePlan(((read("clip"),),))), {})


@pytest.mark.parametrize(("other", "weight"), [(-5.0, 10.0), (50.0, -10.0)])
def test_a_mean_that_is_faint_on_one_side_alone_is_no_measure_either(other: float, weight: float) -> None:
    """A weight that makes a mean out of nothing, and one that takes it away."""
    plain = rows(0.0)
    plain -= plain.mean(dim=1, keepdim=True)
    plain[3] += 5.0
    plain[5] += other
    got = emphasize(plain, weights(t3=weight))
    assert got.square().mean() == pytest.approx(plain.square().mean().item(), rel=1e-4)
