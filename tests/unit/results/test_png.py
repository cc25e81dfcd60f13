import io
import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from serve.domain.orders import ImageRequest
from serve.errors import InvalidRequest
from serve.results.encode import read_parameters
from serve.results.infotext import as_text
from serve.results.png import encode_png, parameters

IMAGE = Image.frombytes("RGB", (3, 2), bytes(range(18)))
PARAMETERS = {
    "prompt": "a (red:1.5) circle\non blue",
    "negative_prompt": "green",
    "model": "shapes",
    "seed": 4294967295,
    "num_inference_steps": 20,
    "guidance_scale": 7.5,
    "width": 64,
    "height": 96,
}


def test_the_text_is_what_a1111_writes() -> None:
    assert as_text(PARAMETERS) == (
        "a (red:1.5) circle\non blue\nNegative prompt: green\n"
        "Steps: 20, CFG scale: 7.5, Seed: 4294967295, Size: 64x96, Model: shapes"
    )
    plain = as_text({**PARAMETERS, "negative_prompt": "", "guidance_scale": 5.0, "model": "a, b: c"})
    assert plain.endswith('on blue\nSteps: 20, CFG scale: 5, Seed: 4294967295, Size: 64x96, Model: "a, b: c"')


REQUEST = ImageRequest(
    model="flux, dev",
    prompt="a red circle",
    width=64,
    height=96,
    num_inference_steps=20,
    guidance_scale=3.5,
    true_cfg_scale=2.0,
    seed=7,
    num_images=4,
    scheduler="flow_euler",
    image=f"{'0' * 32}/image-00c0ffee.png",
    mask=f"{'0' * 32}/mask-00c0ffee.png",
    strength=0.5,
    clip_skip=1,
    preview_every=2,
    step_cache=0.1,
    salt="a tenant's",
)


def test_a_picture_says_how_it_alone_is_made_again() -> None:
    told = parameters(REQUEST, 2, ("step_cache",))
    assert read_parameters(encode_png(IMAGE, told)) == told
    assert told == {
        "prompt": "a red circle",
        "negative_prompt": "",
        "model": "flux, dev",
        "width": 64,
        "height": 96,
        "num_inference_steps": 20,
        "guidance_scale": 3.5,
        "true_cfg_scale": 2.0,
        "seed": 9,
        "scheduler": "flow_euler",
        "strength": 0.5,
        "masked_content": "original",
        "variation_strength": 0.0,
        "prompt_syntax": "a1111",
        "prompt_weighting": "a1111",
        "long_prompt": "chunk",
        "clip_skip": 1,
        "use_t5": True,
        "step_cache": 0.1,
        "tiny_vae": False,
        "output_format": "png",
        "bit_depth": 8,
        "approximate": ["step_cache"],
    }
    assert as_text(told) == (
        "a red circle\nSteps: 20, Sampler: Euler, CFG scale: 2, Distilled CFG Scale: 3.5, Seed: 9, Size: 64x96, "
        'Model: "flux, dev", Denoising strength: 0.5, Clip skip: 2'
    )
    assert "approximate" not in parameters(REQUEST, 0)


def test_a_variation_says_which_it_is() -> None:
    told = parameters(replace(REQUEST, variation_seed=3, variation_strength=0.25, mask_blur=4.0), 2)
    names = ("seed", "variation_seed", "variation_strength", "mask_blur")
    assert [told[name] for name in names] == [7, 5, 0.25, 4.0]


def test_a_picture_opens_the_way_to_no_other() -> None:
    assert b"0" * 32 not in encode_png(IMAGE, parameters(REQUEST, 0))


def test_pixels_are_exact_and_equal_input_gives_equal_bytes() -> None:
    data = encode_png(IMAGE, PARAMETERS)
    assert data == encode_png(IMAGE, PARAMETERS)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        assert image.tobytes() == IMAGE.tobytes()
        assert image.info["parameters"] == as_text(PARAMETERS)


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=20),
        st.text(max_size=300) | st.integers() | st.booleans() | st.floats(allow_nan=False),
        max_size=8,
    ),
    st.text(),
)
def test_every_parameter_comes_back(parameters: dict[str, object], prompt: str) -> None:
    parameters["prompt"] = prompt
    data = encode_png(IMAGE, parameters)
    assert read_parameters(data) == parameters
    with Image.open(io.BytesIO(data)) as image:
        assert image.tobytes() == IMAGE.tobytes()


def _with_chunk(kind: bytes, body: bytes) -> bytes:
    data = encode_png(IMAGE, {})
    chunk = len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    return data[:33] + chunk + data[33:]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0 a JPEG",
        encode_png(IMAGE, {})[:40],
        _with_chunk(b"tEXt", b"tandem\0[1]").replace(b"tandem\0{}", b"tindem\0{}"),
        _with_chunk(b"zTXt", b"tandem\0\0" + zlib.compress(bytes(1 << 24))),
    ],
)
def test_a_file_from_elsewhere_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_parameters(data)
    assert refused.value.param == "image"


@given(st.binary(max_size=200))
def test_garbage_is_refused(tail: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_parameters(encode_png(IMAGE, {})[:33] + tail)
