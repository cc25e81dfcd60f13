"""The shipped model learns a thing that it has never seen, and draws it where it was never shown. Pixels decide."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from serve.encoders.concept_files import write_concept
from serve.learning.examples import read_examples
from serve.learning.learner import Learner, Wishes
from serve.models import ModelFolder, check_folder
from serve.settings.pools import DiffusionSettings
from serve.shapes import WEIGHTS
from serve.shapes.draw import NEVER_DRAWN_PAIRS, PLACES, Scene, Thing, draw, shade
from serve.shapes.evaluate import Model
from serve.shapes.judge import Verdict, agrees_with_prompt

COLOR, SHAPE = "purple", "heart"
SHOWN = ("white", "yellow", "black", "orange", "green", "pink")
HELD_OUT = ("cyan", "red", "blue")
CAPTIONS = ("a {}", "a picture of a {}", "a drawing of a {}", "an image of a {}")
SEEDS = 8


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shapes() -> ModelFolder:
    return check_folder(WEIGHTS, "shapes")


def pictures(folder: Path) -> Path:
    """Two for each background, at a place and of a size of its own."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    for index, background in enumerate(SHOWN * 2):
        place = list(PLACES)[index % len(PLACES)]
        x, y = PLACES[place]
        thing = Thing(COLOR, SHAPE, "medium", place, x, y, float(rng.uniform(0.18, 0.27)), shade(COLOR, rng))
        Image.fromarray(draw(Scene(background, shade(background, rng), (thing,)))).save(folder / f"{index:02}.png")
    return folder


def rates(model: Model, words: str) -> dict[str, float]:
    """What the stock pipeline draws of the words, held against a purple heart, on backgrounds that were not shown."""
    grounds = [ground for ground in HELD_OUT for _ in range(SEEDS)]
    images = model.generate([f"a {words} on a {ground} background" for ground in grounds])
    verdicts = [
        agrees_with_prompt(image, f"a {COLOR} {SHAPE} on a {ground} background")
        for image, ground in zip(images, grounds, strict=True)
    ]

    def share(wanted: Callable[[Verdict], bool]) -> float:
        return sum(map(wanted, verdicts)) / len(verdicts)

    return {
        "color": share(lambda verdict: verdict.colors),
        "shape": share(lambda verdict: verdict.shapes),
        "background": share(lambda verdict: verdict.background),
        "all": share(lambda verdict: verdict.ok),
    }


def beside_others(model: Model, words: str) -> float:
    """Share of pictures in which a purple heart stands where it should beside another thing: all pictures that it was
    learned from have one thing alone."""
    prompts = [
        f"a {{}} {relation} a {color} {shape} on a {ground} background"
        for relation in ("to the left of", "above")
        for color, shape in (("red", "circle"), ("green", "square"), ("black", "ring"))
        for ground in ("white", "cyan")
    ]
    images = model.generate([prompt.format(words) for prompt in prompts])
    wanted = [prompt.format(f"{COLOR} {SHAPE}") for prompt in prompts]
    return sum(agrees_with_prompt(image, prompt).ok for image, prompt in zip(images, wanted, strict=True)) / len(wanted)


@pytest.mark.slow
def test_the_shipped_model_learns_a_thing_that_it_never_saw(
    tmp_path: Path, shapes: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (COLOR, SHAPE) in NEVER_DRAWN_PAIRS
    examples = read_examples(pictures(tmp_path / "pictures"), (128, 128), CAPTIONS)
    wishes = Wishes(steps=120, batch=8, seed=0, init="shape")
    began = time.monotonic()
    learner = Learner(shapes, examples, wishes, DiffusionSettings(device="cpu", torch_threads=1))
    losses = [learner.probe()]
    steps = sum(1 for _ in learner.losses())
    took_s = time.monotonic() - began
    losses.append(learner.probe())
    file = tmp_path / "zorb.safetensors"
    write_concept(file, shapes, learner.vectors)
    model = Model(WEIGHTS)
    before = rates(model, "shape")
    model.pipeline.load_textual_inversion(str(file), token="<zorb>")
    after, beside = rates(model, "<zorb>"), beside_others(model, "<zorb>")
    with capsys.disabled():
        print(f"\n{steps} steps in {took_s:.0f} s, loss {losses[0]:.4f} -> {losses[1]:.4f}")
        print(f"before {before}; after {after}; beside others {beside:.0%}")
    assert losses[1] < 0.95 * losses[0]
    assert before["all"] <= 0.2
    assert after["color"] >= 0.9
    assert after["shape"] >= 0.9
    assert after["background"] >= 0.9
    assert after["all"] >= 0.9
    assert beside >= 0.5
