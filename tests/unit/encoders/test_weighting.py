"""The rules that need no row but the text's own. Compel's: `test_weighting_compel`."""

from dataclasses import replace

import pytest
import torch

from serve.domain.text import EncodeUnit, Weighting
from serve.encoders.weighting import apply, emphasize, multiply
from serve.prompts.wanted import Wanted, WeightedRow

PUBLISHED = {
    "a ": 1.0,
    "house": 1.5730000000000004,
    " ": 1.1,
    "on": 1.0,
    " a ": 1.1,
    "hill": 0.55,
    ", sun, ": 1.1,
    "sky": 1.4641000000000006,
    ".": 1.1,
}
"""What A1111 says of its own example, `a (((house:1.3)) [on] a (hill:0.5), sun, (((sky)))).`, in the docstring of
`parse_prompt_attention`."""


def rows(mean: float) -> torch.Tensor:
    noise = torch.randn(77, 64, generator=torch.Generator().manual_seed(1))
    return noise - noise.mean() + mean


def weights(**at: float) -> tuple[float, ...]:
    return tuple(at.get(f"t{index}", 1.0) for index in range(77))


def emphasis_original(z: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """A1111's `EmphasisOriginal.after_transformers`, on a batch of rows as it has them."""
    original_mean = z.mean()
    z = z * multipliers.reshape((*multipliers.shape, 1)).expand(z.shape)
    new_mean = z.mean()
    return z * (original_mean / new_mean)


def test_weights_of_one_change_no_bit() -> None:
    plain = rows(-0.1)
    assert emphasize(plain, weights()) is plain
    assert multiply(plain, weights()) is plain


def test_a1111s_rule_gives_what_a1111_gives_for_its_own_example() -> None:
    """A token of text for each character, so that every published weight counts."""
    multipliers = [1.0, *(weight for text, weight in PUBLISHED.items() for _ in text)]
    multipliers += [1.0] * (77 - len(multipliers))
    plain = rows(-0.1)
    expected = emphasis_original(plain[None], torch.tensor([multipliers]))[0]
    got = emphasize(plain, tuple(multipliers))
    assert torch.allclose(got, expected, atol=1e-6)
    assert got.mean() == pytest.approx(plain.mean().item(), rel=1e-4)
    assert not torch.allclose(got, plain, atol=0.1)


@pytest.mark.parametrize("mean", [0.0, 0.001, -0.005])
@pytest.mark.parametrize("weight", [-1.0, 0.0, 0.5, 1.1, 1.5, 10.0])
def test_a_faint_mean_restores_the_size_instead(mean: float, weight: float) -> None:
    """A quotient of two means near zero would scale the row by noise, even turn its sign."""
    plain = rows(mean)
    got = emphasize(plain, weights(t3=weight, t4=weight))
    assert got.square().mean() == pytest.approx(plain.square().mean().item(), rel=1e-4)
    assert torch.nn.functional.cosine_similarity(got[0], plain[0], dim=0) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("other", "weight"), [(-5.0, 10.0), (50.0, -10.0)])
def test_a_mean_that_is_faint_on_one_side_alone_is_no_measure_either(other: float, weight: float) -> None:
    """A weight that makes a mean out of nothing, and one that takes it away."""
    plain = rows(0.0)
    plain -= plain.mean(dim=1, keepdim=True)
    plain[3] += 5.0
    plain[5] += other
    got = emphasize(plain, weights(t3=weight))
    assert got.square().mean() == pytest.approx(plain.square().mean().item(), rel=1e-4)


def test_nothing_left_is_nothing() -> None:
    assert torch.equal(emphasize(rows(-0.1), (0.0,) * 77), torch.zeros(77, 64))


def test_multiply_changes_the_weighted_tokens_alone() -> None:
    plain = rows(-0.1)
    got = multiply(plain, weights(t3=1.5, t4=-0.5))
    assert torch.equal(got[3], 1.5 * plain[3])
    assert torch.equal(got[4], -0.5 * plain[4])
    rest = [index for index in range(77) if index not in (3, 4)]
    assert torch.equal(got[rest], plain[rest])


@pytest.mark.parametrize("rule", [Weighting.A1111, Weighting.MULTIPLY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_row_is_weighted_by_itself_and_in_float32(rule: Weighting, dtype: torch.dtype) -> None:
    first, second, third = (EncodeUnit("clip", (number,)) for number in range(3))
    embedded = {first: rows(-0.1).to(dtype), second: rows(0.3).to(dtype), third: rows(0.2).to(dtype)}
    text = Wanted(rule, (WeightedRow(first, weights(t3=1.5)), WeightedRow(second), WeightedRow(third, weights(t4=0.5))))
    function = {Weighting.A1111: emphasize, Weighting.MULTIPLY: multiply}[rule]
    got = apply(text, embedded.__getitem__)
    assert torch.equal(got[0], function(embedded[first].float(), weights(t3=1.5)))
    assert got[1] is embedded[second]
    assert torch.equal(got[2], function(embedded[third].float(), weights(t4=0.5)))
    assert got[0].dtype is torch.float32


@pytest.mark.parametrize("rule", Weighting)
def test_without_weights_every_rule_leaves_the_rows_alone(rule: Weighting) -> None:
    unit = EncodeUnit("clip", (1,))
    plain = rows(-0.1)
    for weighed in (None, weights()):
        (got,) = apply(Wanted(rule, (WeightedRow(unit, weighed),)), {unit: plain}.__getitem__)
        assert got is plain


def test_a_missing_unit_is_an_error() -> None:
    text = Wanted(Weighting.A1111, (WeightedRow(EncodeUnit("clip", (1,)), weights(t3=1.5)),))
    with pytest.raises(KeyError):
        apply(text, {}.__getitem__)
    with pytest.raises(KeyError):
        apply(replace(text, rule=Weighting.MULTIPLY), {}.__getitem__)
