"""The text of A1111: written as it writes it, and read as it reads it."""

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.results.infotext import as_text, read_text

KNOWN = {
    "prompt": "a (red:1.5) circle\non blue",
    "negative_prompt": "green",
    "model": "shapes",
    "seed": 4294967295,
    "num_inference_steps": 20,
    "guidance_scale": 7.5,
    "width": 64,
    "height": 96,
}
LABELS = string.ascii_letters + string.digits + "_ -/"


def test_a_sampler_has_the_names_that_a1111_gives_it() -> None:
    for name, told in {
        "dpmpp_2m_karras": "Sampler: DPM++ 2M, Schedule type: Karras, CFG",
        "dpmpp_2m": "Sampler: DPM++ 2M, Schedule type: Uniform, CFG",
        "euler_a": "Sampler: Euler a, CFG",
        "flow_euler": "Sampler: Euler, CFG",
        "one of a release to come": "Steps: 20, CFG",
    }.items():
        assert told in as_text(KNOWN | {"scheduler": name})


def test_what_an_image_and_a_mask_add() -> None:
    varied = {"variation_seed": 3, "variation_strength": 0.25, "strength": 0.5, "clip_skip": 1, "mask_blur": 4.0}
    assert as_text(KNOWN | varied).endswith(
        "Model: shapes, Variation seed: 3, Variation seed strength: 0.25, Denoising strength: 0.5, Clip skip: 2, "
        "Mask blur: 4"
    )
    assert "Variation" not in as_text(KNOWN | {"variation_strength": 0.0})
    masked = {"mask_blur": 0.0, "masked_content": "latent_noise", "padding_mask_crop": 32}
    ending = "Mask blur: 0, Masked content: latent noise, Inpaint area: Only masked, Masked area padding: 32"
    assert as_text(KNOWN | masked).endswith(ending)
    assert "Masked" not in as_text(KNOWN | {"mask_blur": 0.0, "masked_content": "original"})


def test_what_the_job_does_not_say_goes_over_what_it_says_and_behind_it() -> None:
    more = {"Size": "32x48", "Model": None, "Hires upscale": 2.0, "Hires upscaler": "Lanczos", "Hires steps": 10}
    assert as_text(KNOWN | {"strength": 0.7}, more).endswith(
        "Seed: 4294967295, Size: 32x48, Denoising strength: 0.7, Hires upscale: 2, Hires upscaler: Lanczos, "
        "Hires steps: 10"
    )


def test_a_text_of_a1111_is_read() -> None:
    told = read_text(
        "masterpiece, (girl:1.2), [cat:dog:0.5]\nsecond line, \nNegative prompt: ugly, fat\nblurry: yes\n"
        "Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 965400086, Size: 512x768, "
        'Model hash: 6ce0161689, Model: v1-5, Denoising strength: 0.7, Hires upscale: 2, Hires upscaler: "R, \\"x\\"", '
        'Lora hashes: "detail: 7c6bad76eb54, add: 7c6bad76eb55", Version: v1.10.1'
    )
    assert told == {
        "Prompt": "masterpiece, (girl:1.2), [cat:dog:0.5]\nsecond line,",
        "Negative prompt": "ugly, fat\nblurry: yes",
        "Steps": "30",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "7.5",
        "Seed": "965400086",
        "Size-1": "512",
        "Size-2": "768",
        "Model hash": "6ce0161689",
        "Model": "v1-5",
        "Denoising strength": "0.7",
        "Hires upscale": "2",
        "Hires upscaler": 'R, "x"',
        "Lora hashes": "detail: 7c6bad76eb54, add: 7c6bad76eb55",
        "Version": "v1.10.1",
    }


@pytest.mark.parametrize("text", ["", "a cat", "a cat: one, a dog: two", "two\nlines: 1, of: 2"])
def test_what_has_too_few_settings_is_all_prompt(text: str) -> None:
    assert read_text(text) == {"Prompt": text, "Negative prompt": ""}


def test_a_broken_quote_is_text() -> None:
    told = read_text('x\nSteps: 1, Seed: 2, Size: 3x4, Model: "a, Sampler: "b" c, Version: "\\u12"')
    assert told["Model"] == '"a'
    assert told["Sampler"] == '"b" c'
    assert told["Version"] == '"\\u12"'


@pytest.mark.parametrize("text", ["a" * 1_000_000, "a:" * 500_000, 'a: "' * 250_000, "a " * 500_000, "ab: \\\n" * 9])
def test_a_long_text_takes_no_longer_than_it_is(text: str) -> None:
    """By the square of its length it would take hours."""
    assert read_text(text)["Negative prompt"] == ""
    assert len(read_text(f"x\n{text[:60_000]}, Steps: 1, Seed: 2, Size: 3x4")["Prompt"]) >= 1


def lines(text: str) -> str:
    """As A1111 keeps a text: without blanks around it or around a line."""
    return "\n".join(map(str.strip, text.split("\n"))).strip()


prompts = st.text(st.characters(codec="utf-8"), max_size=200).filter(lambda text: "Negative prompt:" not in text)


@given(prompts, prompts, st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), st.floats(0, 50))
def test_whatever_is_written_is_read_again(prompt: str, negative: str, model: str, scale: float) -> None:
    known = KNOWN | {"prompt": prompt, "negative_prompt": negative, "model": model, "guidance_scale": scale}
    told = read_text(as_text(known))
    parts = model.split("x")
    if len(parts) == 2 and all(part.isascii() and part.isdecimal() for part in parts):
        model = told.pop("Model-1") + "x" + told["Model-2"]  # what looks like a size is one to A1111
        told["Model"] = model
    assert told["Prompt"] == lines(prompt)
    assert told["Negative prompt"] == lines(negative)
    assert told["Model"] == model
    assert float(told["CFG scale"]) == pytest.approx(scale, rel=1e-5)
    assert (told["Seed"], told["Steps"], told["Size-1"], told["Size-2"]) == ("4294967295", "20", "64", "96")


values = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(lambda value: not value[0].isdecimal())


@given(
    st.dictionaries(
        st.text(LABELS, min_size=2, max_size=30).filter(lambda label: label.strip() == label), values, max_size=4
    )
)
def test_further_settings_are_read_again(more: dict[str, Any]) -> None:
    more = {label: value for label, value in more.items() if label[0] not in "-/"}
    told = read_text(as_text(KNOWN, more))
    assert {label: told[label] for label in more} == more


@given(st.text(max_size=300))
def test_any_text_is_read(text: str) -> None:
    assert {"Prompt", "Negative prompt"} <= read_text(text).keys()
