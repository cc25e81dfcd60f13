"""The judge reads drawn pictures right, and does not read wrong ones as right."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serve.shapes import expectation
from serve.shapes.captions import caption
from serve.shapes.draw import COLOR_NAMES, SHAPES, Scene, draw, sample_scene, shade
from serve.shapes.expectation import Expectation, ExpectedThing
from serve.shapes.judge import agrees, agrees_with_prompt, color_name, read

SEEDS = st.integers(0, 2**32 - 1)


def scene_of(seed: int, *, two: bool | None = None) -> Scene:
    return sample_scene(np.random.default_rng(seed), held_out=bool(seed % 2), two=two)


def test_the_judge_reads_drawn_pictures_right() -> None:
    verdicts = [agrees(read(draw(scene)), scene) for scene in map(scene_of, range(400))]
    assert np.mean([verdict.ok for verdict in verdicts]) >= 0.99
    assert np.mean([verdict.iou for verdict in verdicts]) >= 0.97


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_any_drawn_scene_is_named_and_placed(seed: int) -> None:
    scene = scene_of(seed, two=False)
    reading = read(draw(scene))
    thing = scene.things[0]
    assert reading.background == scene.background
    assert len(reading.things) == 1
    assert (reading.things[0].color, reading.things[0].shape) == (thing.color, thing.shape)
    assert abs(reading.things[0].x - thing.x) < 0.02
    assert abs(reading.things[0].y - thing.y) < 0.08, "the star and the triangle are not centred in their boxes"


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_a_wrong_colour_shape_background_or_order_is_refused(seed: int) -> None:
    scene = scene_of(seed, two=False)
    thing = scene.things[0]
    reading = read(draw(scene))
    other_color = next(c for c in COLOR_NAMES if c not in (thing.color, scene.background))
    other_shape = next(s for s in SHAPES if s != thing.shape)
    assert not agrees(reading, replace(scene, things=(replace(thing, color=other_color),))).colors
    assert not agrees(reading, replace(scene, things=(replace(thing, shape=other_shape),))).shapes
    assert not agrees(reading, replace(scene, background=other_color)).background
    pair = scene_of(seed, two=True)
    assert not agrees(read(draw(pair)), replace(pair, things=pair.things[::-1])).places


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_a_complete_caption_says_what_its_scene_shows(seed: int) -> None:
    scene = scene_of(seed)
    asked = expectation.of_prompt(caption(scene, random.Random(seed), complete=True))
    truth = expectation.of_scene(scene)
    assert asked.background == truth.background
    assert asked.relation == truth.relation
    assert [(t.color, t.shape) for t in asked.things] == [(t.color, t.shape) for t in truth.things]
    assert all(a.place in (None, t.place) for a, t in zip(asked.things, truth.things, strict=True))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red circle on a blue background", Expectation("blue", (ExpectedThing("red", "circle"),))),
        ("Violet donut, best quality", Expectation(None, (ExpectedThing("purple", "ring"),))),
        ("turquoise backdrop", Expectation("cyan", ())),
        (
            "a pink box under a white star on black",
            Expectation("black", (ExpectedThing("white", "star"), ExpectedThing("pink", "square")), "above"),
        ),
    ],
)
def test_prompts_are_read(prompt: str, expected: Expectation) -> None:
    assert expectation.of_prompt(prompt) == expected


def test_a_prompt_about_something_else_is_an_error() -> None:
    with pytest.raises(ValueError, match="knows"):
        expectation.of_prompt("a cat")


def test_pictures_come_as_pil_bytes_or_floats() -> None:
    scene = scene_of(4, two=False)
    pixels = draw(scene)
    assert read(Image.fromarray(pixels)) == read(pixels) == read(pixels / 255)
    assert agrees_with_prompt(Image.fromarray(pixels), caption(scene, random.Random(1), complete=True)).ok
    with pytest.raises(ValueError, match="height"):
        read(pixels[..., 0])


def test_empty_and_noisy_pictures_are_not_accepted() -> None:
    scene = scene_of(4)
    assert read(np.zeros((128, 128, 3), np.uint8)).things == ()
    assert not agrees(read(np.zeros((128, 128, 3), np.uint8)), scene).ok
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    assert not agrees(read(noise), scene).ok


def test_other_sizes_are_read_too() -> None:
    scene = scene_of(6, two=False)
    for size in (64, 256):
        assert agrees(read(draw(scene, size)), scene).ok


def test_every_shade_keeps_its_name() -> None:
    rng = np.random.default_rng(3)
    named = [color_name(np.asarray(shade(name, rng))) == name for name in COLOR_NAMES for _ in range(100)]
    assert np.mean(named) > 0.99


def test_reading_is_fast() -> None:
    pictures = [draw(scene_of(seed)) for seed in range(20)]
    began = time.process_time()
    for picture in pictures:
        read(picture)
    assert (time.process_time() - began) / len(pictures) < 0.03
