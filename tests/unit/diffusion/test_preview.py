"""Previews: near the finished image from the first steps on, for a model whose VAE the map was fitted to."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.image_models import BUILDERS
from support.parity import SETTINGS, hole, picture

from serve.diffusion.preview import PreviewMap
from serve.diffusion.run import Work
from serve.diffusion.runner import Latents, Runner, open_runner
from serve.models import check_folder

MakeWork = Callable[..., Work]


def seen(runner: Runner, work: Work, step: int) -> tuple[Image.Image, Image.Image]:
    """The preview after `step` forward passes, and the finished image."""
    source = runner.encode(work)
    row = runner.rows(work)[0]
    runner.begin(row, work, source)
    preview = b""
    for done in range(1, row.steps + 1):
        assert not runner.step([row])
        if done == step:
            preview = runner.preview(runner.peek(row))
    return Image.open(io.BytesIO(preview)), runner.decode(runner.release(row))


def likeness(preview: Image.Image, final: Image.Image) -> tuple[float, float]:
    """Mean absolute difference in 1/255, and correlation, at the latents' size."""
    size = (final.width // 8, final.height // 8)
    a, b = (np.asarray(image.resize(size, Image.Resampling.BOX), dtype=float) for image in (preview, final))
    return float(np.abs(a - b).mean()), float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.mark.parametrize("scheduler", ["dpmpp_2m_karras", "euler_a", "euler", "heun", None])
@pytest.mark.parametrize("step", [3, 16])
def test_a_preview_is_like_the_finished_image(runner: Runner, work: MakeWork, scheduler: str | None, step: int) -> None:
    job = work("seen", num_inference_steps=16, guidance_scale=3.0, preview_every=1, scheduler=scheduler)
    error, correlation = likeness(*seen(runner, job, step))
    assert error < 30
    assert correlation > 0.9


def test_a_preview_while_inpainting_keeps_what_is_kept(runner: Runner, work: MakeWork) -> None:
    original = picture(128, 128)
    job = work("kept", image=original, mask=hole(128, 128), num_inference_steps=10, preview_every=1)
    preview = seen(runner, job, 1)[0].resize((128, 128))
    left = (0, 0, 40, 128)
    difference = np.abs(np.asarray(preview.crop(left), dtype=float) - np.asarray(original.crop(left), dtype=float))
    assert difference.mean() < 40


def test_without_previews_asked_for_the_latents_are_shown(runner: Runner, work: MakeWork) -> None:
    preview, _ = seen(runner, work("plain", num_inference_steps=4, width=160), 4)
    assert preview.format == "JPEG"
    assert preview.size == (20 * 4, 16 * 4), "a latent is enlarged where few are shown"


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_every_family_has_previews(tmp_path: Path, family: str) -> None:
    runner = open_runner(check_folder(BUILDERS[family](tmp_path / family), family), SETTINGS)
    channels = runner.family.model.denoiser.latent_channels
    image = Image.open(io.BytesIO(runner.preview(Latents(torch.randn(1, channels, 70, 100), None, False))))
    assert image.size == (100, 70)


@pytest.mark.parametrize("grey", [0.0, 0.5, 1.0])
def test_plain_backgrounds_have_no_tint(runner: Runner, grey: float) -> None:
    latents = runner.family.vae.encode(torch.full((1, 3, 128, 128), 2 * grey - 1)).mode()
    colours = PreviewMap(runner.family.vae).colours(latents)[4:-4, 4:-4].reshape(-1, 3).mean(axis=0)
    assert np.abs(colours - 255 * grey).max() < 16


def test_latents_that_are_no_numbers_are_shown_grey(runner: Runner) -> None:
    colours = PreviewMap(runner.family.vae).colours(torch.full((1, 4, 8, 8), torch.nan))
    assert colours.shape == (8, 8, 3)
    assert (colours == 128).all()
