"""Pictures from pictures in the A1111 dialect, by its client."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image, ImageDraw
from support.a1111 import api_of, pixels
from support.drawing import Drawing

from serve.shapes.draw import COLORS
from serve.shapes.judge import agrees_with_prompt, read

GROUND, STAR = "a red circle on a blue background", "a green star on a yellow background"
SMALL = {"seed": 7, "steps": 2, "width": 64, "height": 64, "cfg_scale": 1.0}


@pytest.fixture(scope="module")
def api(drawing: Drawing) -> Any:
    return api_of(drawing)


@pytest.fixture(scope="module")
def start() -> Image.Image:
    """What GROUND says."""
    image = Image.new("RGB", (128, 128), COLORS["blue"])
    ImageDraw.Draw(image).ellipse((34, 34, 94, 94), COLORS["red"])
    return image


def half(width: int, height: int) -> Image.Image:
    """A mask of the left half."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def as_text(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_a_picture_is_drawn_over(api: Any, start: Image.Image) -> None:
    size = {"width": 128, "height": 128, "seed": 5}
    far = api.img2img(images=[start], prompt=STAR, denoising_strength=1.0, steps=20, **size)
    assert agrees_with_prompt(far.image, STAR).ok
    near = api.img2img(images=[start], prompt=GROUND, denoising_strength=0.3, steps=10, **size)
    assert read(near.image).background == "blue"
    assert abs(pixels(near.image) - pixels(start)).mean() < 12
    assert near.info["denoising_strength"] == 0.3
    assert near.parameters["init_images"] is None


def test_white_is_repainted_and_the_rest_stays(api: Any, start: Image.Image) -> None:
    order = {"images": [start], "prompt": STAR, "denoising_strength": 1.0, "seed": 5, "steps": 4, "cfg_scale": 1.0}
    size = {"width": 128, "height": 128}
    left = pixels(api.img2img(**order, **size, mask_image=half(128, 128), mask_blur=0).image)
    before = pixels(start)
    assert (left[:, 64:] == before[:, 64:]).all()
    assert abs(left[:, :64] - before[:, :64]).mean() > 20
    right = pixels(api.img2img(**order, **size, mask_image=half(128, 128), mask_blur=0, inpainting_mask_invert=1).image)
    assert (right[:, :64] == before[:, :64]).all()
    assert abs(right[:, 64:] - before[:, 64:]).mean() > 20


def test_only_the_masked_part_is_drawn_unless_told_otherwise(api: Any) -> None:
    """As A1111's clients have it by default: the picture keeps its size and all that is not masked."""
    large, spot = Image.linear_gradient("L").resize((320, 200)).convert("RGB"), Image.new("L", (320, 200))
    spot.paste(255, (200, 60, 260, 120))
    order = {"images": [large], "mask_image": spot, "mask_blur": 0, "prompt": STAR, "denoising_strength": 1.0}
    order |= {"seed": 5, "steps": 3, "cfg_scale": 1.0, "width": 64, "height": 64}
    answer = api.img2img(**order, inpaint_full_res_padding=16)
    changed = abs(pixels(answer.image) - pixels(large))
    masked = pixels(spot.convert("RGB"))[..., 0] > 0
    assert answer.image.size == large.size
    assert changed[~masked].max() == 0
    assert changed[masked].mean() > 20
    told = answer.info["extra_generation_params"]
    assert (told["Inpaint area"], told["Masked area padding"], told["Masked content"]) == ("Only masked", 16, "fill")
    whole = api.img2img(**order, inpaint_full_res=False, inpainting_fill=1)
    assert whole.image.size == (64, 64)
    assert not {"Inpaint area", "Masked content"} & whole.info["extra_generation_params"].keys()


@pytest.mark.slow
def test_the_edge_of_the_mask_is_as_soft_as_it_says(api: Any, start: Image.Image) -> None:
    order = {"images": [start], "prompt": STAR, "denoising_strength": 1.0, "seed": 5, "steps": 2}
    soft = api.img2img(**order, width=128, height=128, mask_image=half(128, 128))  # the client sends 4
    assert soft.info["extra_generation_params"]["Mask blur"] == 4
    changed = abs(pixels(soft.image) - pixels(start)).max(axis=(0, 2))
    assert changed[64:70].all()
    assert not changed[64 + 3 * 4 + 1 :].any()


@pytest.mark.slow
def test_a_picture_comes_to_the_size_as_asked(api: Any) -> None:
    wide = Image.new("RGB", (128, 64), "red")
    wide.paste("blue", (32, 0, 96, 64))
    order = {"images": [wide], "prompt": "blue", "denoising_strength": 0.3, "seed": 1, "steps": 4, "cfg_scale": 1.0}
    stretched, cropped = (pixels(api.img2img(**order, width=64, height=64, resize_mode=mode).image) for mode in (0, 1))
    edge = (slice(8, 56), slice(0, 8))
    assert stretched[edge][..., 0].mean() > 150 > stretched[edge][..., 2].mean()
    assert cropped[edge][..., 2].mean() > 150 > cropped[edge][..., 0].mean()


def test_each_round_starts_from_the_same_picture(api: Any) -> None:
    order = {"images": [Image.linear_gradient("L").convert("RGB")], "prompt": STAR, "mask_image": half(256, 256)}
    order |= SMALL | {"resize_mode": 1, "inpainting_mask_invert": 1, "mask_blur": 2}
    both = api.img2img(**order, n_iter=2).images
    single = api.img2img(**order | {"seed": 8}).image
    assert abs(pixels(both[1]) - pixels(single)).max() <= 1


def test_without_a_size_it_is_the_pictures(drawing: Drawing) -> None:
    order = {"prompt": "a star", "steps": 2, "cfg_scale": 1, "init_images": [as_text(Image.new("RGB", (96, 72)))]}
    answer = httpx.post(f"{drawing.url}/sdapi/v1/img2img", json=order).raise_for_status()
    file = Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0])))
    assert file.size == (96, 72)


def test_a_picture_that_was_drawn_here_may_be_named(drawing: Drawing, api: Any) -> None:
    api.txt2img(**SMALL, prompt=GROUND)
    (job,) = httpx.get(f"{drawing.url}/v1/jobs", params={"limit": 1}).json()["data"]
    order = {**SMALL, "prompt": GROUND, "init_images": [f"{job['id']}/0"], "denoising_strength": 0.5}
    httpx.post(f"{drawing.url}/sdapi/v1/img2img", json=order).raise_for_status()


@pytest.fixture(scope="module")
def http(drawing: Drawing) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=drawing.url) as client:
        yield client


IMAGE = as_text(Image.new("RGB", (64, 64)))
REFUSED = {
    "init_images": [
        {"init_images": ["no base64"]},
        {"init_images": [as_text(Image.new("RGB", (4, 4)))]},
        {"init_images": ["http://example.com/a.png"]},
        {"init_images": [base64.b64encode(b"GIF89a").decode()]},
        {"init_images": [IMAGE[: len(IMAGE) // 8 * 4]]},
        {"init_images": [IMAGE, IMAGE]},
    ],
    "mask": [{"mask": as_text(Image.new("L", (32, 64)))}, {"mask": "%"}],
    "denoising_strength": [{"denoising_strength": 0}, {"denoising_strength": 1.5}],
    "resize_mode": [{"resize_mode": 4}],
    "mask_blur": [{"mask": IMAGE, "mask_blur": 65}],
    "mask_blur_y": [{"mask": IMAGE, "mask_blur_y": 9}],
    "latent_mask": [{"latent_mask": IMAGE}],
    "initial_noise_multiplier": [{"initial_noise_multiplier": 1.5}],
}


@pytest.mark.parametrize(("param", "order"), [(name, order) for name, orders in REFUSED.items() for order in orders])
def test_a_refusal_names_the_field_as_the_client_does(http: httpx.Client, param: str, order: dict[str, Any]) -> None:
    answer = http.post("/sdapi/v1/img2img", json={**SMALL, "prompt": "a", "init_images": [IMAGE]} | order)
    assert answer.status_code == 422, answer.text
    assert answer.json()["param"] == param


@pytest.mark.parametrize("order", [{}, {"init_images": []}, {"init_images": None}, {"init_images": ["0" * 32 + "/0"]}])
def test_without_a_picture_it_is_a_404(http: httpx.Client, order: dict[str, Any]) -> None:
    answer = http.post("/sdapi/v1/img2img", json={"prompt": "a star", "seed": 1} | order)
    assert answer.status_code == 404
    assert answer.json()["param"] == "init_images"
