import pytest
import torch

from serve.encoders.codec import pack
from serve.encoders.compose import compose, emphasize
from serve.encoders.forward import TextTower


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


def test_units_become_conditioning(tower: TextTower, plan) -> None:
    weighted, plain = plan("a (red:1.5) circle", "star"), plan("a red circle", "star")
    embeddings = {unit.key: pack(row) for unit, row in zip(plain.units, tower.encode(plain.units), strict=True)}
    got, reference = compose(weighted, embeddings), compose(plain, embeddings)
    assert got.positive.dtype is torch.float32
    assert got.positive.shape == got.negative.shape == reference.positive.shape
    assert torch.equal(got.negative, reference.negative)
    ratio = got.positive.norm(dim=1) / reference.positive.norm(dim=1)
    strong = [index for index, weight in enumerate(weighted.positive.weights) if weight == 1.5]
    assert ratio[strong] / ratio[0] == pytest.approx(1.5, rel=1e-4)


def test_a_missing_unit_is_an_error(plan) -> None:
    with pytest.raises(KeyError):
        compose(plan("red"), {})


@pytest.mark.parametrize(("other", "weight"), [(-5.0, 10.0), (50.0, -10.0)])
def test_a_mean_that_is_faint_on_one_side_alone_is_no_measure_either(other: float, weight: float) -> None:
    """A weight that makes a mean out of nothing, and one that takes it away."""
    plain = rows(0.0)
    plain -= plain.mean(dim=1, keepdim=True)
    plain[3] += 5.0
    plain[5] += other
    got = emphasize(plain, weights(t3=weight))
    assert got.square().mean() == pytest.approx(plain.square().mean().item(), rel=1e-4)
