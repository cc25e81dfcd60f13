"""What a mask, a size and a variation mean to the native dialect, from the order to the picture's pixels."""

import base64
import io
from typing import Any

import httpx
import numpy as np
from PIL import Image, ImageOps
from support.drawing import Drawing
from support.parity import picture

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
FAST = {"prompt": "a green square on a yellow background", "seed": 3, "num_inference_steps": 4}
SIZE = {"width": 128, "height": 128}


def text(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def job(drawing: Drawing, **order: Any) -> Any:
    ended = httpx.post(f"{drawing.url}/v1/jobs?wait=true", json=FAST | order, timeout=60).raise_for_status().json()
    assert ended["state"] == "succeeded"
    return ended


def pixels(drawing: Drawing, place: str) -> Pixels:
    """The picture that is kept there."""
    file = httpx.get(f"{drawing.url}/v1/images/{place}").raise_for_status().content
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def test_the_rest_of_a_resized_picture_stays_under_an_inverted_mask(drawing: Drawing) -> None:
    tall, left = picture(160, 320), Image.new("L", (160, 320))
    left.paste(255, (0, 0, 80, 320))
    order = {"image": text(tall), "mask": text(left), "mask_blur": 0, **SIZE}
    crop = job(drawing, **order, resize_mode="crop", mask_invert=True)
    fill = job(drawing, **order, resize_mode="fill")
    of_crop, of_fill = [
        np.abs(pixels(drawing, f"{each['id']}/0").astype(int) - fitted(tall, (128, 128), Image.Resampling.LANCZOS))
        for each, fitted in ((crop, ImageOps.fit), (fill, ImageOps.pad))
    ]
    assert of_crop[:, :64].max() == 0
    assert of_crop[:, 64:].mean() > 20
    assert of_fill[:, 64:96].max() == 0  # the bars beside columns 32 to 96 repeat its edges
    assert of_fill[:, 32:64].mean() > 20


def test_a_detail_of_a_large_picture_is_drawn_and_put_back(drawing: Drawing) -> None:
    large, spot = picture(300, 200), Image.new("L", (300, 200))
    spot.paste(255, (200, 60, 240, 100))
    order = {"image": text(large), "mask": text(spot), "padding_mask_crop": 8, "mask_blur": 0, "strength": 1}
    ended = job(drawing, **order)
    assert (ended["request"]["width"], ended["request"]["height"]) == (128, 128)
    (image,) = ended["images"]
    assert (image["width"], image["height"]) == (300, 200)
    changed = np.abs(pixels(drawing, f"{ended['id']}/0").astype(int) - np.asarray(large))
    assert changed[np.asarray(spot) == 0].max() == 0
    assert changed[np.asarray(spot) > 0].mean() > 20
    again = job(drawing, **ended["request"])
    assert (pixels(drawing, f"{again['id']}/0") == pixels(drawing, f"{ended['id']}/0")).all()


def test_the_request_of_a_job_draws_the_same_once_more(drawing: Drawing) -> None:
    half = Image.new("L", (160, 320))
    half.paste(255, (0, 0, 160, 200))
    order = {"image": text(picture(160, 320)), "mask": text(half), "mask_blur": 3, "mask_invert": True, **SIZE}
    first = job(drawing, **order, resize_mode="crop", variation_strength=0.3)
    assert first["request"]["variation_seed"] is not None
    again = job(drawing, **first["request"])
    assert (pixels(drawing, f"{first['id']}/0") == pixels(drawing, f"{again['id']}/0")).all()


def test_variations_of_a_job_are_those_of_their_seeds(drawing: Drawing) -> None:
    both = job(drawing, variation_seed=8, variation_strength=0.1, num_images=2)
    assert [image["seed"] for image in both["images"]] == [3, 3]
    second = job(drawing, variation_seed=9, variation_strength=0.1)
    pictures = [
        pixels(drawing, each).astype(int) for each in (f"{both['id']}/0", f"{both['id']}/1", f"{second['id']}/0")
    ]
    assert np.abs(pictures[1] - pictures[2]).max() <= 1
    assert np.abs(pictures[0] - pictures[1]).max() > 1
