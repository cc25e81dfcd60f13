"""Attention in slices: what is cut, and that the sum of the parts is the whole."""

import threading

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from serve.diffusion import attention
from serve.diffusion.attention import SlicedAttention, slice_attention, sliced


def tensors(lanes: int, heads: int, tokens: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(lanes, heads, tokens, 16), (lanes, heads, keys, 16), (lanes, heads, keys, 24)]
    query, key, value = (torch.randn(size, generator=generator) for size in sizes)
    return query, key, value


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of scores of each slice that torch is given."""
    seen: list[int] = []

    def counted(query: torch.Tensor, key: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        seen.append(query.shape[:-1].numel() * key.shape[-2])
        return scaled_dot_product_attention(query, key, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "scaled_dot_product_attention", counted)
    return seen


@pytest.mark.parametrize("mask", [None, (2, 1, 1, 33), (2, 5, 40, 33), (40, 33), (1, 5, 1, 33)])
@pytest.mark.parametrize(("scores", "most"), [(40 * 33 * 3, 40 * 33 * 2), (40 * 33, 40 * 33), (100, 99), (7, 33)])
def test_slices_give_what_the_whole_gives(
    monkeypatch: pytest.MonkeyPatch, slices: list[int], mask: tuple[int, ...] | None, scores: int, most: int
) -> None:
    """Of several heads, one head, some queries of a head, one query."""
    monkeypatch.setattr(attention, "SCORES", scores)
    query, key, value = tensors(2, 5, 40, 33)
    hidden = None if mask is None else torch.randn(mask, generator=torch.Generator().manual_seed(1))
    expected = scaled_dot_product_attention(query, key, value, hidden, scale=0.3)
    assert torch.allclose(sliced(query, key, value, hidden, scale=0.3), expected, atol=1e-6)
    assert len(slices) > 1
    assert max(slices) <= max(most, scores)
    assert sum(slices) == 2 * 5 * 40 * 33, "everything once"


def test_small_and_other_attention_is_not_cut(monkeypatch: pytest.MonkeyPatch, slices: list[int]) -> None:
    query, key, value = tensors(2, 4, 32, 32)
    sliced(query, key, value)
    assert len(slices) == 1
    monkeypatch.setattr(attention, "SCORES", 64)
    sliced(query, key, value, is_causal=True)
    sliced(query, key[:, :2], value[:, :2], enable_gqa=True)
    sliced(query[0], key[0], value[0])
    assert len(slices) == 4


def test_it_is_this_models_alone_and_this_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES", 64)
    cut: list[bool] = []
    monkeypatch.setattr(attention, "sliced", lambda *args, **options: cut.append(True) or args[0])

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return scaled_dot_product_attention(x, x, x)

    model, other, x = Model(), Model(), torch.randn(1, 2, 32, 16)
    slice_attention(model, True)
    slice_attention(model, True)
    model(x)
    assert cut == [True], "once, however often it was asked for"
    other(x)
    with SlicedAttention():
        beside = threading.Thread(target=lambda: scaled_dot_product_attention(x, x, x))
        beside.start()
        beside.join()
    assert cut == [True]
    slice_attention(model, False)
    model(x)
    assert cut == [True]
