"""Which part of a picture is drawn for its mask, and how it comes back into it."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from support.parity import picture

from serve.diffusion.area import area_of
from serve.diffusion.engine import Engine, Work
from serve.diffusion.fill import filled
from serve.diffusion.paste import pasted
from serve.domain.orders import MaskedContent

MakeWork = Callable[..., Work]
SIDE = 128


def spot(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """A mask that is white in the box."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


@st.composite
def masks(draw: st.DrawFn) -> tuple[Image.Image, tuple[int, int, int, int]]:
    width, height = draw(st.integers(8, 300)), draw(st.integers(8, 300))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    box = (left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height)))
    return spot((width, height), box), box


@settings(max_examples=60, deadline=None)
@given(masks(), st.integers(0, 64), st.sampled_from([0.0, 4.0]), st.integers(1, 32), st.integers(1, 32))
def test_the_area_has_the_mask_and_what_is_around_it(
    given_mask: tuple[Image.Image, tuple[int, int, int, int]], padding: int, blur: float, wide: int, high: int
) -> None:
    mask, box = given_mask
    size = 8 * wide, 8 * high
    area = area_of(Image.new("RGB", mask.size), mask, *size, padding=padding, blur=blur)
    left, top, right, bottom = area.box
    assert 0 <= left <= max(0, box[0] - padding)
    assert 0 <= top <= max(0, box[1] - padding)
    assert min(mask.width, box[2] + padding) <= right <= mask.width
    assert min(mask.height, box[3] + padding) <= bottom <= mask.height
    outside = np.array(area.share)
    outside[top:bottom, left:right] = 0
    assert not outside.any(), "nothing is shown that was not drawn"
    # As wide for its height as the order, or all of the picture one way.
    width, height = area.size
    assert (
        abs(width - size[0] / size[1] * height) <= 1 + size[0] / size[1] or mask.width == width or mask.height == height
    )
    assert area.drawn_from(area.picture, *size).size == size
    inner = area.inner(*size)
    assert (inner[0] == 0 and inner[2] == size[0]) or (inner[1] == 0 and inner[3] == size[1])


def test_a_black_mask_is_all_of_the_picture() -> None:
    area = area_of(Image.new("RGB", (90, 40)), Image.new("L", (90, 40)), 64, 64, padding=5, blur=0)
    assert area.box == (0, 0, 90, 40)


@pytest.mark.parametrize("depth", [8, 16])
def test_a_part_that_is_not_changed_comes_back_as_it_was(work: MakeWork, depth: int) -> None:
    """Also where the box has another ratio than what is drawn, and another size: to and fro is all but exact."""
    large = Image.fromarray(np.asarray(picture(32, 32).resize((200, 100), Image.Resampling.BICUBIC)))
    mask = spot(large.size, (90, 0, 100, 100))
    job = work("a", image=large, mask=mask, width=256, height=128, padding_mask_crop=0, mask_blur=0, bit_depth=depth)
    assert job.area is not None
    assert job.image is not None
    assert job.mask is not None
    assert job.area.box == (0, 0, 200, 100)
    assert job.image.size == job.mask.size == (256, 128)
    pixels = np.asarray(job.image)
    drawn = job.image if depth == 8 else pixels.astype(np.uint16) * 257
    back = np.asarray(pasted(drawn, job), int) // (1 if depth == 8 else 257)
    before = np.asarray(large, int)
    assert back.shape == before.shape
    assert np.abs(back - before)[:, 90:100].mean() < 1
    assert (np.delete(back, np.s_[90:100], 1) == np.delete(before, np.s_[90:100], 1)).all()


def test_a_detail_of_a_large_picture_is_drawn_at_the_order_s_size(engine: Engine, work: MakeWork) -> None:
    """A spot of 40 pixels in a picture of 300 gets all of the 128 that the model draws."""
    large, box = picture(300, 300), (200, 60, 240, 100)
    mask = spot(large.size, box)
    order = {"image": large, "mask": mask, "strength": 1.0, "padding_mask_crop": 8, "mask_blur": 0.0}
    job = work("detail", num_inference_steps=4, **order)
    assert job.area is not None
    assert job.area.box == (192, 52, 248, 108)
    found = np.asarray(engine.submit(job, lambda step: None).result(60).images[0], int)
    before = np.asarray(large, int)
    inside = np.asarray(mask) > 0
    assert found.shape == before.shape
    assert (found[~inside] == before[~inside]).all()
    assert np.abs(found - before)[inside].mean() > 20


def test_the_mask_is_filled_with_the_colours_around_it() -> None:
    """Each side of a mask across a border of two colours takes its own side's; what is beside it stays."""
    image = Image.new("RGB", (96, 96), "red")
    image.paste("blue", (48, 0, 96, 96))
    before = image.copy()
    mask = spot(image.size, (24, 40, 72, 56))
    ImageDraw.Draw(image).rectangle((24, 40, 71, 55), fill="white")
    done = np.asarray(filled(image, mask), int)
    assert (done[np.asarray(mask) == 0] == np.asarray(before)[np.asarray(mask) == 0]).all()
    assert done[48, 24:34, 0].min() > 200 > 60 > done[48, 24:34, 2].max()
    assert done[48, 62:72, 2].min() > 200 > 60 > done[48, 62:72, 0].max()
    everything = Image.new("L", image.size, 255)
    assert np.array_equal(np.asarray(filled(image, everything)), np.asarray(image)), "nothing is around it"


def test_all_but_a_pixel_is_filled_with_its_colour() -> None:
    image = Image.new("RGB", (64, 64), "white")
    image.putpixel((3, 3), (10, 200, 30))
    mask = Image.new("L", image.size, 255)
    mask.putpixel((3, 3), 0)
    far = np.asarray(filled(image, mask), int)[60, 60]
    assert np.abs(far - (10, 200, 30)).max() <= 3


def test_what_is_under_the_mask_is_as_asked(engine: Engine, work: MakeWork) -> None:
    """At a small strength little is drawn, so that the answer shows what it began with."""
    start = Image.new("RGB", (SIDE, SIDE), "white")
    start.paste("black", (32, 32, 96, 96))
    order = {"image": start, "mask": spot((SIDE, SIDE), (32, 32, 96, 96)), "strength": 0.25, "guidance_scale": 1.0}
    order |= {"num_inference_steps": 4, "mask_blur": 0.0}
    futures = {
        content: engine.submit(work(content, **order, masked_content=content), lambda step: None)
        for content in MaskedContent
    }
    inside: Mapping[MaskedContent, np.ndarray] = {
        content: np.asarray(future.result(60).images[0], float)[40:88, 40:88] for content, future in futures.items()
    }
    assert inside[MaskedContent.ORIGINAL].mean() < 60
    assert inside[MaskedContent.FILL].mean() > 200
    flat, noisy = (inside[each].std(axis=(0, 1)).mean() for each in (MaskedContent.FILL, MaskedContent.LATENT_NOISE))
    assert noisy > 2 * flat
    means = {content: tuple(pixels.mean(axis=(0, 1)).round()) for content, pixels in inside.items()}
    assert len(set(means.values())) == 4
