"""`tandem learn` as an operator meets it: what it refuses before it loads anything, what it leaves, how it is ended."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from serve.cli.app import app
from serve.cli.learn_story import Stop
from serve.encoders.concept_files import read_concept
from serve.errors import OperatorError
from serve.learning.learner import Learner
from serve.shapes.draw import draw, sample_scene

Learn = Callable[..., str]


@pytest.fixture
def learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Learn:
    """Runs it on two pictures; what it prints. Raises what it refuses."""
    import numpy as np

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for index in range(2):
        scene = sample_scene(np.random.default_rng(index), two=False)
        Image.fromarray(draw(scene)).save(tmp_path / "pictures" / f"{index}.png")

    def run(*arguments: str) -> str:
        standing = ["--images", "pictures", "--set", "diffusion.device=cpu", "--set", "diffusion.torch_threads=1"]
        result = CliRunner().invoke(app, ["learn", *standing, *arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code in (0, 1), result.output
        return result.output

    return run


def test_it_leaves_a_concept_and_a_sheet_where_the_server_looks(learn: Learn, tmp_path: Path) -> None:
    quick = ("--set", "model.num_inference_steps=2")
    previews = ("--preview-every", "1", "--preview", "a {} on white")
    said = learn("zorb", "--init", "red circle", "--steps", "2", *previews, *quick)
    folder = tmp_path / ".tandem" / "concepts"
    assert {file.name for file in folder.iterdir()} == {"zorb.safetensors", "zorb.png"}
    assert "<zorb>: 2 vectors for shapes, 2 steps" in said
    (found,) = read_concept(folder / "zorb.safetensors")
    assert found.values.shape == (2, 128)
    with safe_open(folder / "zorb.safetensors", "pt") as file:
        assert file.metadata()["init"] == "red circle"
        assert file.metadata()["steps"] == "2"
    sheet = Image.open(folder / "zorb.png")
    assert sheet.width > 4 * 256
    assert sheet.height > 4 * 256, "the pictures, before, after each of two steps"


def test_ctrl_c_keeps_what_was_learned(learn: Learn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Learner._step

    def interrupted(learner: Learner) -> float:
        loss = step(learner)
        if learner.done == 3:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(Learner, "_step", interrupted)
    said = learn("zorb", "--steps", "500", "--preview-every", "0")
    assert "3 steps" in said
    assert read_concept(tmp_path / ".tandem" / "concepts" / "zorb.safetensors")


def test_what_fails_later_keeps_what_was_learned(learn: Learn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Learner._step

    def failing(learner: Learner) -> float:
        if learner.done == 2:
            raise RuntimeError("the device failed")
        return step(learner)

    monkeypatch.setattr(Learner, "_step", failing)
    with pytest.raises(Exception, match="learning failed"):
        learn("zorb", "--steps", "500", "--preview-every", "0")
    assert read_concept(tmp_path / ".tandem" / "concepts" / "zorb.safetensors")


def test_a_second_ctrl_c_ends_at_once_and_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("a cat",), "name: 'a cat'"),
        (("../cat",), "name: '../cat'"),
        (("cat", "--out", "cat.pt"), r"--out cat\.pt: it must end with \.safetensors"),
        (("cat", "--model", "sd15"), "--model sd15: the settings have shapes"),
        (("cat", "--caption", "a cat"), "caption: the caption 'a cat' lacks {}"),
        (("cat", "--preview", "a cat", "--steps", "1"), "preview: the caption 'a cat' lacks {}"),
        (("cat", "--init", "red circle", "--vectors", "1"), "init: 'red circle' is 2 tokens, for 1 vectors"),
        (("cat", "--images", "nowhere"), "--images nowhere"),
        (("cat", "--set", "diffusion.dtype=float16"), r"diffusion\.dtype: gradients are too small"),
    ],
)
def test_what_it_can_not_do_is_one_line(learn: Learn, tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    with pytest.raises(OperatorError, match=told) as raised:
        learn(*arguments)
    assert "\n" not in raised.value.message
    assert not (tmp_path / ".tandem" / "concepts" / "cat.safetensors").exists()


def test_a_concept_that_is_there_is_written_over_only_if_asked(learn: Learn, tmp_path: Path) -> None:
    few = ("--steps", "1", "--preview-every", "0")
    learn("zorb", *few)
    before = (tmp_path / ".tandem" / "concepts" / "zorb.safetensors").read_bytes()
    with pytest.raises(OperatorError, match="there is one already; --replace"):
        learn("zorb", *few, "--seed", "1")
    assert (tmp_path / ".tandem" / "concepts" / "zorb.safetensors").read_bytes() == before
    learn("zorb", *few, "--seed", "1", "--replace")
    assert (tmp_path / ".tandem" / "concepts" / "zorb.safetensors").read_bytes() != before
