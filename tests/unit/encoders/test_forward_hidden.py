"""Rows with words that nothing looks at, against transformers' own models with an attention mask."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.towers import all_outputs, make, random_rows
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel, UMT5EncoderModel

from serve.domain.text import EncodeUnit
from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import Encoder

KINDS = ("clip", "clip-projected", "openclip", "t5", "umt5")
LENGTH = {"t5": 19, "umt5": 19}


def stock(encoder: Encoder, rows: list[Row]) -> dict[str, torch.Tensor]:
    """Hidden states and projections; `hidden` and `skip:N` by name."""
    part, ids = encoder.part, torch.tensor([row.token_ids for row in rows])
    mask = torch.ones_like(ids)
    for row, own in zip(rows, mask, strict=True):
        own[list(row.hidden)] = 0
    clip = CLIPTextModel if part.projection is None else CLIPTextModelWithProjection
    kind = {"clip": clip, "t5": T5EncoderModel, "umt5": UMT5EncoderModel}[part.kind]
    model = kind.from_pretrained(part.weights, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        found = model(ids, mask, output_hidden_states=True)
    named = {"hidden": found.last_hidden_state}
    named |= {f"skip:{n}": found.hidden_states[-(n + 1)] for n in range(1, part.layers + 1)}
    if part.projection is not None:
        named |= {f"projected:{name}": found.text_embeds for name, _ in encoder.projections}
    return named


def with_hidden(encoder: Encoder, count: int, length: int | None = None) -> list[Row]:
    """Words somewhere in the row, other ones in each; what begins and ends it is looked at."""
    rows = random_rows(encoder, count, length)
    places = [tuple(range(1 + index, 3 + 2 * index)) for index in range(count)]
    return [replace(row, hidden=hidden) for row, hidden in zip(rows, places, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_output_is_the_stock_models_under_that_mask(encoders: Mapping[str, Encoder], kind: str) -> None:
    encoder = encoders[kind]
    rows = with_hidden(encoder, 4)
    expected = stock(encoder, rows)
    plain = stock(encoder, [replace(row, hidden=()) for row in rows])
    found = make(encoder, all_outputs(encoder)).encode(rows)
    for name, tensors in expected.items():
        for place, tensor in enumerate(tensors):
            assert torch.allclose(found[place][name], tensor, atol=1e-5, rtol=0), name
    assert not torch.allclose(expected["hidden"], plain["hidden"], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_hidden_changes_no_token_that_does_not_look_at_it(encoders: Mapping[str, Encoder], kind: str) -> None:
    """Another word in the hidden place changes that place alone."""
    encoder = encoders[kind]
    tower = make(encoder, ("hidden",))
    (row,) = random_rows(encoder, 1)
    ids = list(row.token_ids)
    ids[3] = 5 if ids[3] != 5 else 6
    one, other = (
        found["hidden"] for found in tower.encode([replace(row, hidden=(3,)), Row(tuple(ids), None, (), (3,))])
    )
    rest = [place for place in range(len(ids)) if place != 3]
    assert torch.allclose(one[rest], other[rest], atol=1e-6, rtol=0)
    assert not torch.allclose(one[3], other[3], atol=1e-2)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_any_batch_equals_each_alone(
    encoders: Mapping[str, Encoder], towers: dict[str, TextTower], kind: str, data: st.DataObject
) -> None:
    """Rows with hidden words beside rows without."""
    encoder = encoders[kind]
    tower = towers.setdefault(kind, make(encoder))
    pool = random_rows(encoder, 4)
    hidden = st.sets(st.integers(1, LENGTH.get(kind, 77) - 2), max_size=12).map(lambda places: tuple(sorted(places)))
    picks = st.tuples(st.sampled_from(pool), hidden).map(lambda pick: replace(pick[0], hidden=pick[1]))
    rows = data.draw(st.lists(picks, min_size=1, max_size=6))
    computed = tower.rows
    found = tower.encode(rows)
    assert tower.rows == computed + len(set(rows))
    for row, values in zip(rows, found, strict=True):
        (alone,) = tower.encode([row])
        for name, value in values.items():
            assert torch.allclose(value, alone[name], atol=1e-5, rtol=0), name


@pytest.fixture(scope="module")
def towers() -> dict[str, TextTower]:
    return {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_hides_too(encoders: Mapping[str, Encoder], kind: str, dtype: str) -> None:
    encoder = encoders[kind]
    rows = with_hidden(encoder, 2)
    half, full = make(encoder, ("hidden",), dtype=dtype).encode(rows), make(encoder, ("hidden",)).encode(rows)
    for ours, exact in zip(half, full, strict=True):
        assert ours["hidden"].isfinite().all()
        cosine = torch.cosine_similarity(ours["hidden"].float(), exact["hidden"], dim=-1)
        assert cosine.min() > 0.99


def test_a_batch_that_hides_nothing_is_given_no_mask(encoders: Mapping[str, Encoder]) -> None:
    """The kernels that need none are the fast ones, and the graphs that are compiled at start know of none."""
    tower = make(encoders["clip"])
    masks: list[object] = []
    tower._trunk.layers[0].register_forward_pre_hook(lambda _, args: masks.append(args[1]))
    (row,) = random_rows(encoders["clip"], 1)
    tower.encode([row])
    tower.encode([row, replace(row, hidden=(2,))])
    assert masks[0] is None
    assert masks[1] is not None


def test_what_is_hidden_makes_another_row(encoders: Mapping[str, Encoder]) -> None:
    tower = make(encoders["clip"])
    (row,) = random_rows(encoders["clip"], 1)
    plain, hidden, again = tower.encode([row, replace(row, hidden=(2, 3)), replace(row, hidden=(2, 3))])
    assert tower.rows == 2
    assert torch.equal(hidden["skip:1"], again["skip:1"])
    assert not torch.allclose(plain["skip:1"], hidden["skip:1"], atol=1e-3)


@pytest.mark.parametrize("place", [-1, 77])
def test_a_position_that_is_not_there_is_an_error_and_no_forward(encoders: Mapping[str, Encoder], place: int) -> None:
    tower = make(encoders["clip"])
    (row,) = random_rows(encoders["clip"], 1)
    with pytest.raises(ValueError):
        tower.encode([replace(row, hidden=(place,))])
    assert (tower.forwards, tower.rows) == (0, 0)


def test_the_row_of_a_unit_gives_that_unit() -> None:
    unit = EncodeUnit("fingerprint", (1, 2, 3), "skip:2", "tenant", ("digest",), (1,))
    assert Row.of(unit, ("hidden",)) == Row((1, 2, 3), "skip:2", ("digest",), (1,))
    assert Row.of(unit, ("hidden", "skip:2")) == Row((1, 2, 3), None, ("digest",), (1,))
    assert Row.of(unit, ()).unit(unit.encoder, unit.output, unit.salt) == unit
