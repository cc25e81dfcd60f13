import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextModel, CLIPTokenizer

from serve.encoders.codec import MAX_ERROR, pack, unpack
from serve.models import SHIPPED

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bit_for_bit(dtype: torch.dtype) -> None:
    tensor = torch.randn(77, 16).to(dtype)
    tensor[0, :3] = torch.tensor([float("inf"), -0.0, 1e-8]).to(dtype)
    back = unpack(pack(tensor))
    assert back.dtype is dtype
    assert torch.equal(back, tensor)
    assert pack(back) == pack(tensor)


def test_a_view_packs_as_its_own_values() -> None:
    batch = torch.randn(4, 77, 16)
    packed = pack(batch[2])
    assert torch.equal(unpack(packed), batch[2])
    assert len(packed) < 2 * 77 * 16 * 4
    assert torch.equal(unpack(pack(batch[1].T)), batch[1].T)


def error(back: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Relative root mean square error by row."""
    back, rows = back.double(), rows.double()
    return ((back - rows).square().mean(1) / rows.square().mean(1)).sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_near_and_small(dtype: torch.dtype) -> None:
    rows = torch.randn(77, 768, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = pack(rows, "int8")
    back = unpack(packed)
    assert back.dtype is dtype
    assert 0.005 < error(back, rows).median() < MAX_ERROR
    assert len(packed) < len(pack(rows)) / (0.95 * dtype.itemsize)


def test_a_row_with_outliers_is_kept_bit_for_bit_and_spoils_no_other() -> None:
    rows = torch.randn(77, 768, generator=torch.Generator().manual_seed(0)).half()
    plain = unpack(pack(rows, "int8"))
    rows[0, 133], rows[0, 725] = -28.0, 33.0  # begin-of-text of OpenAI's CLIP-L
    back = unpack(pack(rows, "int8"))
    assert torch.equal(back[0], rows[0])
    assert torch.equal(back[1:], plain[1:])
    assert not torch.equal(back[1:], rows[1:])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(1280),
        torch.randn(3, 7, 16),
        torch.randn(8, 64, dtype=torch.float64),
        torch.arange(64).reshape(2, 32),
        torch.zeros(0, 16),
        torch.zeros(16, 0),
        torch.full((4, 32), math.nan),
    ],
    ids=["pooled", "three axes", "float64", "integers", "no rows", "no columns", "all kept"],
)
def test_what_int8_does_not_fit_is_packed_exactly(tensor: torch.Tensor) -> None:
    assert pack(tensor, "int8") == pack(tensor)


NUMBERS = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1e-45, 1e-39, 65504.0, 3.4e38])
ROWS = st.integers(1, 40).flatmap(lambda width: st.lists(st.lists(NUMBERS, min_size=width, max_size=width), min_size=1))


@given(ROWS, st.sampled_from(DTYPES))
def test_every_row_of_any_tensor_comes_back_near_or_exactly(values: Sequence[Any], dtype: torch.dtype) -> None:
    rows = torch.tensor(values, dtype=torch.float32).to(dtype)
    packed = pack(rows, "int8")
    back = unpack(packed)
    assert back.dtype is dtype
    assert back.shape == rows.shape
    assert len(packed) <= len(pack(rows))
    same = torch.tensor([pack(one) == pack(other) for one, other in zip(back, rows, strict=True)])
    near = error(back, rows) <= MAX_ERROR * 1.001
    zero = (rows == 0).all(1) & (back == 0).all(1)
    assert (same | near | zero).all()
    assert torch.equal(same, same | ~rows.isfinite().all(1))
    assert pack(rows, "int8") == packed
    assert pack(unpack(packed)) == pack(back)


def test_the_shipped_encoder_has_no_row_that_int8_spoils() -> None:
    """The figures of the module's docstring."""
    model = CLIPTextModel.from_pretrained(SHIPPED / "text_encoder", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")
    texts = ["", "a red circle on a blue background", "two green squares and a yellow triangle", "a small star"]
    ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.inference_mode():
        hidden = model(input_ids=ids).last_hidden_state
    for rows in hidden:
        packed = pack(rows, "int8")
        assert len(packed) < 10_500
        assert len(pack(rows)) > 39_400
        errors = error(unpack(packed), rows)
        assert errors.min() > 0.004
        assert errors.max() < 0.009
