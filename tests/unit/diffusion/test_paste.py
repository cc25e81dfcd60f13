"""What a mask leaves stays the image's own to the bit, through the whole engine."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.parity import picture

from serve.diffusion.engine import Engine, Work
from serve.diffusion.paste import pasted

MakeWork = Callable[..., Work]
BLUR = 4.0
SIDE, EDGE = 128, 48
"""Of the picture; the mask is white to the left of column EDGE."""
ORIGINAL = picture(SIDE, SIDE)
COLUMNS = np.arange(SIDE)
OUTSIDE = COLUMNS >= EDGE


def mask() -> Image.Image:
    white = np.zeros((SIDE, SIDE), np.uint8)
    white[:, :EDGE] = 255
    return Image.fromarray(white)


def drawn(engine: Engine, work: MakeWork, **fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The pictures by name, drawn together."""
    futures = {
        name: engine.submit(
            work(name, image=ORIGINAL, mask=mask(), strength=1.0, num_inference_steps=4, **each), lambda step: None
        )
        for name, each in fields.items()
    }
    return {name: np.asarray(future.result(60).images[0]) for name, future in futures.items()}


def test_what_the_mask_leaves_is_the_image_s_own(engine: Engine, work: MakeWork) -> None:
    found = drawn(engine, work, none={}, hard={"mask_blur": 0.0}, soft={"mask_blur": BLUR})
    original, none = np.asarray(ORIGINAL), found["none"].astype(int)
    assert np.abs(none - original)[:, OUTSIDE].max() > 8  # a VAE there and back; else there would be nothing to keep
    assert np.abs(none - original)[:, ~OUTSIDE].mean() > 20  # and nothing was repainted
    assert (found["hard"][:, OUTSIDE] == original[:, OUTSIDE]).all()
    assert np.abs(found["hard"] - none)[:, ~OUTSIDE].max() <= 1
    assert (found["soft"][:, COLUMNS > EDGE + 3 * BLUR] == original[:, COLUMNS > EDGE + 3 * BLUR]).all()
    assert np.abs(found["soft"] - none)[:, ~OUTSIDE].max() <= 1


def test_the_edge_fades_as_twice_the_blurred_mask(work: MakeWork) -> None:
    job = work("a", image=Image.new("RGB", (SIDE, SIDE)), mask=mask(), mask_blur=BLUR)
    shown = np.asarray(pasted(Image.new("RGB", (SIDE, SIDE), "white"), job))
    away = COLUMNS + 0.5 - EDGE
    wanted = np.array([min(1.0, math.erfc(each / BLUR / math.sqrt(2))) for each in away])
    assert np.abs(shown[SIDE // 2, :, 0] / 255 - wanted).max() < 0.03
    assert (np.diff(shown[SIDE // 2, :, 0].astype(int)) <= 0).all()


@pytest.mark.parametrize("blur", [0.0, BLUR])
def test_sixteen_bits_are_kept_as_exactly(engine: Engine, work: MakeWork, blur: float) -> None:
    found = drawn(engine, work, none={"bit_depth": 16}, kept={"bit_depth": 16, "mask_blur": blur})
    far = EDGE + 3 * blur <= COLUMNS
    assert found["kept"].dtype == np.uint16
    assert (found["kept"][:, far] == np.asarray(ORIGINAL, np.uint16)[:, far] * 257).all()
    assert np.abs(found["kept"].astype(int) - found["none"])[:, ~OUTSIDE].max() <= 257


def test_without_a_blur_or_a_mask_the_picture_is_the_decoder_s(work: MakeWork) -> None:
    white = Image.new("RGB", (SIDE, SIDE), "white")
    for fields in ({}, {"image": ORIGINAL}, {"image": ORIGINAL, "mask": mask()}):
        assert pasted(white, work("a", **fields)) is white
