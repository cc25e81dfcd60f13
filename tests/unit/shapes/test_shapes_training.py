"""The training code: the parts that can be checked alone, and every stage once, quickly."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from serve.shapes import WEIGHTS
from serve.shapes.captions import Phrase, caption, sample_two_tone
from serve.shapes.draw import sample_scene
from serve.shapes.train import main, train
from serve.shapes.training.config import QUICK
from serve.shapes.training.latents import load_latents, row
from serve.shapes.training.muon import Muon, orthogonalize
from serve.shapes.training.text import PhraseEmbedder, make_text_encoder
from serve.shapes.training.tokenizer import load_tokenizer
from serve.shapes.training.unet import TimestepSampler, make_scheduler


@pytest.mark.parametrize("shape", [(3, 8, 24), (2, 24, 8)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_muon_fits_a_matrix_and_its_state_can_be_restored() -> None:
    torch.manual_seed(0)
    goal = torch.randn(16, 16)
    weight = torch.nn.Parameter(torch.zeros(16, 16))
    muon = Muon([weight])
    for _ in range(300):
        weight.grad = weight.detach() - goal
        muon.step(0.02)
    assert (weight - goal).pow(2).mean() < 0.05 * goal.pow(2).mean()
    twin = Muon([torch.nn.Parameter(torch.zeros(16, 16))])
    twin.load_state(muon.state())
    assert torch.equal(twin.state()[0], muon.state()[0])


def test_timesteps_cover_all_noise_and_favour_the_middle() -> None:
    torch.manual_seed(0)
    alphas = make_scheduler().alphas_cumprod
    steps = TimestepSampler(alphas, -0.7, 1.8)(20_000)
    assert 0 <= steps.min() < 10
    assert 990 < steps.max() <= 999
    log_snr = (alphas / (1 - alphas)).log()[steps]
    assert abs(log_snr.median() + 0.7) < 0.3


def test_phrases_blend_and_weigh_as_they_say() -> None:
    tokenizer = load_tokenizer(WEIGHTS / "tokenizer")
    torch.manual_seed(0)
    embed = PhraseEmbedder(tokenizer, make_text_encoder(QUICK, tokenizer).eval())
    with torch.no_grad():
        red, blue, empty = embed([Phrase("a red circle"), Phrase("a blue circle"), Phrase("")])
        blend, heavy = embed(
            [Phrase("a red circle", other="a blue circle", mix=0.25), Phrase("a red circle", word="red", weight=1.5)]
        )
    torch.testing.assert_close(blend, 0.75 * red + 0.25 * blue)
    expected = red.clone()
    expected[2] = empty[2] + 1.5 * (red[2] - empty[2])
    torch.testing.assert_close(heavy, expected)


def test_every_weighted_word_is_in_its_caption() -> None:
    for seed in range(200):
        _, phrase = sample_two_tone(np.random.default_rng(seed))
        assert not phrase.word or phrase.word in phrase.text.replace("-", " ").split()


def test_incomplete_captions_leave_things_unsaid_and_all_stay_short() -> None:
    texts = [
        caption(sample_scene(np.random.default_rng(seed)), random.Random(seed), complete=False) for seed in range(500)
    ]
    assert len(set(texts)) > 400
    assert any("background" not in text and " on " not in text for text in texts)
    tokenizer = load_tokenizer(WEIGHTS / "tokenizer")
    assert max(len(ids) for ids in tokenizer(texts).input_ids) <= 77


def test_training_rows_follow_from_the_seed_and_the_index() -> None:
    assert row(0, 5) == row(0, 5)
    assert row(0, 5) != row(0, 6)
    assert row(0, 5) != row(1, 5)


def test_every_stage_runs_and_the_result_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    main(["--out", str(tmp_path), "--quick"])
    assert torch.get_num_threads() == threads
    assert torch.tensor(5e-324, dtype=torch.float64) * 1 > 0, "denormals are flushed"
    assert load_latents(tmp_path / "latents").shape == (QUICK.latents, 4, 16, 16)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model").to(torch.float32)
    picture = pipeline("a red circle", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (128, 128, 3)
    before = capsys.readouterr().out
    assert "unet: done" in before
    train(QUICK, tmp_path)
    assert "unet: there already" in capsys.readouterr().out
