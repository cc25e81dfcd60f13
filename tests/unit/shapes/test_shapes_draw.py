"""The world: geometry, pixels, and the discipline of what is held out of training."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serve.shapes.captions import Phrase, between, held_out_prompts, training_row
from serve.shapes.draw import (
    COLOR_NAMES,
    NEVER_DRAWN_PAIRS,
    PALETTE,
    SHAPES,
    Scene,
    draw,
    is_held_out,
    is_pair_held_out,
    may_train_on,
    render,
    sample_scene,
    signed_distance,
)
from serve.shapes.sheet import contact_sheet

SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_distance_is_negative_inside_and_never_steeper_than_one(shape: str) -> None:
    axis = np.linspace(-2, 2, 401)
    distance = signed_distance(shape, axis[None, :], axis[:, None])
    assert (distance < 0).any()
    assert (distance[[0, -1]] > 0).all()
    assert (distance[:, [0, -1]] > 0).all()
    slope = max(np.abs(np.diff(distance, axis=axis_number)).max() for axis_number in (0, 1)) / (axis[1] - axis[0])
    assert slope < 1.05, "edges would be sharper than one pixel"


def test_an_unknown_shape_is_an_error() -> None:
    with pytest.raises(KeyError):
        signed_distance("hexagon", np.zeros(1), np.zeros(1))


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_a_window_is_a_part_of_the_picture(seed: int) -> None:
    scene = sample_scene(np.random.default_rng(seed))
    np.testing.assert_allclose(
        render(scene, left=24, top=40, window=32), render(scene)[40:72, 24:56], rtol=0, atol=1e-5
    )


def test_drawing_gives_bytes_of_the_right_colours() -> None:
    scene = sample_scene(np.random.default_rng(0), two=False)
    pixels = draw(scene)
    assert pixels.shape == (128, 128, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels[0, 0] / 255, scene.background_rgb, atol=0.003)


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_training_never_sees_a_held_out_combination(seed: int) -> None:
    scene, phrase = training_row(np.random.default_rng(seed))
    assert may_train_on(scene)
    for thing in scene.things:
        assert (thing.color, thing.shape) not in NEVER_DRAWN_PAIRS
        assert not is_held_out(thing.color, thing.shape, scene.background)
    if phrase is not None:
        assert_mixed_words_are_trainable(scene, phrase)


def assert_mixed_words_are_trainable(scene: Scene, phrase: Phrase) -> None:
    """A mixed row also names a second colour; the triple with it must be one that training may see."""
    thing = scene.things[0]
    named = {word for word in COLOR_NAMES if word in (phrase.text + " " + phrase.other).replace("-", " ").split()}
    for color in named - {scene.background, thing.color}:
        as_thing = not is_held_out(color, thing.shape, scene.background)
        as_background = not is_held_out(thing.color, thing.shape, color)
        assert as_thing or as_background


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.booleans())
def test_held_out_scenes_are_what_training_may_not_see(seed: int, two: bool) -> None:
    scene = sample_scene(np.random.default_rng(seed), held_out=True, two=two)
    assert len(scene.things) == 1 + two
    assert not may_train_on(scene)
    if two:
        assert is_pair_held_out(*scene.things)
        assert is_pair_held_out(*reversed(scene.things)), "the order of the two does not matter"


def test_about_a_quarter_of_the_triples_is_held_out() -> None:
    triples = [(c, s, b) for c in COLOR_NAMES for s in SHAPES for b in COLOR_NAMES if c != b]
    share = np.mean([is_held_out(*triple) for triple in triples])
    assert 0.2 < share < 0.32
    for name in COLOR_NAMES:
        assert any(not is_held_out(*triple) for triple in triples if triple[0] == name)


def test_held_out_prompts_repeat_and_differ_by_seed() -> None:
    assert held_out_prompts(5) == held_out_prompts(5)
    assert held_out_prompts(5) != held_out_prompts(5, seed=78)
    assert held_out_prompts(3) == held_out_prompts(5)[:3]
    assert all(len(scene.things) == 2 for _, scene in held_out_prompts(5, two=True))


def test_between_two_colours_lies_the_mean() -> None:
    np.testing.assert_allclose(between("red", "blue", 0.5), (PALETTE[0] + PALETTE[COLOR_NAMES.index("blue")]) / 2)
    np.testing.assert_allclose(between("red", "blue", 0), PALETTE[0])


def test_a_contact_sheet_has_a_row_for_every_eight(tmp_path: Path) -> None:
    scenes = [sample_scene(np.random.default_rng(seed)) for seed in range(9)]
    contact_sheet(
        [("a caption that is much too long for one line", draw(scene) / 255) for scene in scenes], tmp_path / "s.png"
    )
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width > 8 * 128
        assert 2 * 128 < sheet.height < 3 * 128
        corner = np.asarray(sheet.convert("RGB"))[12 + 2, 12 + 2] / 255
    np.testing.assert_allclose(corner, scenes[0].background_rgb, atol=0.02)
