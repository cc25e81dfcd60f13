"""Noise on its way from one seed to another's, and the pictures that come of it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.parity import difference, drawn, picture

from serve.diffusion.engine import Work
from serve.diffusion.noise import varied
from serve.diffusion.runner import Runner
from serve.diffusion.state import start_from_noise

MakeWork = Callable[..., Work]
SHAPE = (1, 4, 16, 24)


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(low: np.ndarray, high: np.ndarray, share: float) -> np.ndarray:
    """Shoemake's formula, column after column."""
    mixed = np.empty_like(low)
    for channel in range(low.shape[1]):
        for column in range(low.shape[3]):
            a, b = low[0, channel, :, column], high[0, channel, :, column]
            angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            shares = np.sin((1 - share) * angle) / np.sin(angle), np.sin(share * angle) / np.sin(angle)
            mixed[0, channel, :, column] = shares[0] * a + shares[1] * b
    return mixed


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_columns_go_along_their_arcs(share: float) -> None:
    mixed = varied(noise(3), 4, share)
    expected = by_hand(noise(3).double().numpy(), noise(4).double().numpy(), share)
    assert np.abs(mixed.double().numpy() - expected).max() < 1e-5
    assert 0.9 < float(mixed.std()) < 1.1


def test_half_way_along_a_straight_line_would_be_too_quiet() -> None:
    assert float(((noise(3) + noise(4)) / 2).std()) < 0.75  # what the arc is for


@pytest.mark.parametrize("height", [1, 2, 16])
def test_parallel_columns_stay_numbers(height: int) -> None:
    shape = (1, 4, height, 24)
    for share in (0.0, 0.3, 0.5, 1.0):
        assert varied(noise(3, shape), 4, share).isfinite().all()
        assert torch.allclose(varied(noise(3, shape), 3, share), noise(3, shape), atol=1e-6)
    assert varied(noise(3, shape).half(), 4, 0.5).dtype == torch.float16


def test_an_image_starts_from_the_mixed_noise_and_goes_on_with_its_own_seed(runner: Runner, work: MakeWork) -> None:
    request = work("a", seed=5, num_images=2, variation_seed=9, variation_strength=0.3).request
    for index in range(2):
        start = start_from_noise(runner.family, request, index, (16, 24))
        assert torch.equal(start.noise, varied(noise(5, start.noise.shape), 9 + index, 0.3))
        plain = start_from_noise(runner.family, work("a", seed=5).request, 0, (16, 24))
        later, its = [torch.randn(4, generator=each.generator) for each in (start, plain)]
        assert torch.equal(later, its)


def test_variations_lead_from_one_picture_to_another(runner: Runner, work: MakeWork) -> None:
    def of(seed: int, **fields: float) -> np.ndarray:
        (image,) = drawn(runner, work("a", seed=seed, scheduler="ddim", **fields))
        return np.asarray(image, dtype=float)

    first, other = of(3), of(4)
    shares = (0.005, 0.02, 0.05)  # of more, this model moves what it draws to another place
    away = [np.abs(of(3, variation_seed=4, variation_strength=share) - first).mean() for share in shares]
    assert 0 < away[0] < away[1] < away[2] < 0.25 * np.abs(other - first).mean()
    assert np.abs(of(3, variation_seed=4, variation_strength=1.0) - other).max() <= 1


def test_image_i_of_a_job_is_variation_i(runner: Runner, work: MakeWork) -> None:
    job = work("a", image=picture(128, 128), seed=1, num_images=3, variation_seed=6, variation_strength=0.5)
    images = drawn(runner, job)
    for index, image in enumerate(images):
        one = replace(job, request=replace(job.request, num_images=1, variation_seed=6 + index))
        assert difference(image, drawn(runner, one)[0]) <= 1
    assert difference(images[0], images[1]) > 1
