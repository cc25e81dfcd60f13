"""Compel's rule over a table of units, against Compel itself with the text encoder in hand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import pytest
import torch
from compel.embeddings_provider import (
    EmbeddingsProvider,
    EmbeddingsProviderMulti,
    ReturnedEmbeddingsType,
    SplitLongTextMode,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support.towers import make
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from serve.domain.text import EncodeUnit, Weighting
from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import Encoder
from serve.encoders.weighting import apply
from serve.prompts.tokenizers import PromptTokenizer
from serve.prompts.wanted import NO_WORDS, Wanted, WeightedRow, runs, wanted

Fragments = Sequence[tuple[str, float]]

RETURNED = {
    "hidden": ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED,
    "skip:1": ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
}
SPLIT = SplitLongTextMode.BRUTAL
"""At a full row, wherever that is: what is parted where is not this rule's matter."""
T5_TOKENS = 96


@dataclass(frozen=True, slots=True, repr=False)
class Side:
    """One encoder, ours and Compel's: the same files."""

    encoder: Encoder
    tower: TextTower
    tokenizer: PromptTokenizer
    stock: Any
    stock_tokenizer: Any

    @property
    def length(self) -> int:
        return self.encoder.part.row_tokens or T5_TOKENS

    def plan(self, fragments: Fragments, output: str) -> Wanted:
        """Rows that are filled to the last token, as Compel's are here."""
        parts = [(self.tokenizer.tokenize(text).ids, weight) for text, weight in fragments]
        ids = [token for part, _ in parts for token in part]
        factors = [weight for part, weight in parts for _ in part]
        numbers, room = runs(factors), self.tokenizer.room(self.length)
        before = len(self.tokenizer.before)
        rows = []
        for start in range(0, max(1, len(ids)), room):
            used = tuple(ids[start : start + room])
            after = self.length - before - len(used)
            unit = EncodeUnit(self.tower.fingerprint, self.tokenizer.row(used, self.length), output)
            weights = (*(1.0,) * before, *factors[start : start + room], *(1.0,) * after)
            words = (*(NO_WORDS,) * before, *numbers[start : start + room], *(NO_WORDS,) * after)
            rows.append(WeightedRow(unit, weights, words))
        empty = EncodeUnit(self.tower.fingerprint, self.tokenizer.row((), self.length), output)
        return wanted(Weighting.COMPEL, rows, empty)

    def table(self, plan: Wanted) -> dict[EncodeUnit, torch.Tensor]:
        """All that the plan wants, in one forward."""
        values = self.tower.encode([Row.of(unit, self.tower.outputs) for unit in plan.units])
        return {unit: found[unit.output] for unit, found in zip(plan.units, values, strict=True)}

    def ours(self, fragments: Fragments, output: str) -> torch.Tensor:
        plan = self.plan(fragments, output)
        return torch.cat(apply(plan, self.table(plan).__getitem__))

    def compels(self, fragments: Fragments, output: str) -> torch.Tensor:
        """A T5's text has one row: in several, Compel takes the first word of each for a begin token, and never hides
        it."""
        provider = EmbeddingsProvider(
            self.stock_tokenizer,
            self.stock,
            truncate=self.encoder.part.kind != "clip",
            returned_embeddings_type=RETURNED[output],
            split_long_text_mode=SPLIT,
            model_max_length=self.length,
        )
        return told(provider, fragments)


@torch.inference_mode()
def told(provider: Any, fragments: Fragments) -> torch.Tensor:
    texts, weights = [text for text, _ in fragments], [weight for _, weight in fragments]
    found: torch.Tensor = provider.get_embeddings_for_weighted_prompt_fragments([texts], [weights])
    return found[0]


@pytest.fixture(scope="module")
def sides(encoders: Mapping[str, Encoder]) -> Mapping[str, Side]:
    def side(name: str, model: Any, tokenizer: Any) -> Side:
        encoder = encoders[name]
        stock = model.from_pretrained(encoder.part.weights, attn_implementation="sdpa").eval()
        own = tokenizer.from_pretrained(encoder.part.tokenizer)
        return Side(encoder, make(encoder), PromptTokenizer(encoder.part), stock, own)

    return {
        "clip": side("clip", CLIPTextModel, CLIPTokenizer),
        "openclip": side("openclip", CLIPTextModelWithProjection, CLIPTokenizer),
        "t5": side("t5", T5EncoderModel, T5Tokenizer),
    }


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    scale = max(1.0, float(expected.abs().max()))
    return found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5 * scale, rtol=0)


def fused(fragments: Fragments) -> Fragments:
    """As Compel's parser hands them on: neighbours of one weight are one."""
    return [(" ".join(text for text, _ in run), weight) for weight, run in groupby(fragments, key=lambda part: part[1])]


WORDS = ["a", "red circle", "blue", "tiny, purple star", "on a white background", "masterpiece", "!", "緑", "un-known"]
weights = st.sampled_from([-1.0, 0.0, 0.3, 0.5, 0.909, 1.0, 1.1, 1.5, 2.0]) | st.floats(-3.0, 3.0, width=32)
corpus = st.lists(st.tuples(st.sampled_from(WORDS), weights), min_size=1, max_size=8).map(fused)
long_corpus = (
    st.lists(st.tuples(st.sampled_from(WORDS), st.integers(1, 60), weights), min_size=2, max_size=6)
    .map(lambda parts: fused([(" ".join([words] * times), weight) for words, times, weight in parts]))
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(fragments=corpus)
@pytest.mark.parametrize(
    ("kind", "output"), [("clip", "hidden"), ("clip", "skip:1"), ("openclip", "skip:1"), ("t5", "hidden")]
)
def test_any_text_of_one_row_is_compels(
    sides: Mapping[str, Side], kind: str, output: str, fragments: Fragments
) -> None:
    assert close(sides[kind].ours(fragments, output), sides[kind].compels(fragments, output))


@settings(max_examples=40, deadline=None)
@given(fragments=long_corpus)
@pytest.mark.parametrize(("kind", "output"), [("clip", "hidden"), ("openclip", "skip:1")])
def test_any_text_of_several_rows_is_compels(
    sides: Mapping[str, Side], kind: str, output: str, fragments: Fragments
) -> None:
    """A fragment that goes on in the next row is one, and its share counts in rows that have none of it."""
    assert close(sides[kind].ours(fragments, output), sides[kind].compels(fragments, output))


@settings(max_examples=40, deadline=None)
@given(fragments=corpus)
def test_both_encoders_of_sdxl_side_by_side_are_compels(sides: Mapping[str, Side], fragments: Fragments) -> None:
    pair = [sides["clip"], sides["openclip"]]
    compel = EmbeddingsProviderMulti(
        [side.stock_tokenizer for side in pair],
        [side.stock for side in pair],
        truncate=False,
        returned_embeddings_type=RETURNED["skip:1"],
        split_long_text_mode=SPLIT,
    )
    ours = torch.cat([side.ours(fragments, "skip:1") for side in pair], dim=-1)
    assert close(ours, told(compel, fragments))


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_it_does_what_it_says(sides: Mapping[str, Side], kind: str) -> None:
    """Above 1 away from the empty text; 0.5 half-way to the row without the words, 0 all the way."""
    side = sides[kind]
    text = ("a", 1.0), ("red", 1.0), ("circle", 1.0)

    def weighed(weight: float) -> tuple[Wanted, dict[EncodeUnit, torch.Tensor], torch.Tensor]:
        plan = side.plan([text[0], ("red", weight), text[2]], "hidden")
        table = side.table(plan)
        return plan, table, apply(plan, table.__getitem__)[0]

    def stretched(plan: Wanted, table: dict[EncodeUnit, torch.Tensor], unit: EncodeUnit) -> torch.Tensor:
        empty = table[plan.empty]
        return empty + (table[unit] - empty) * torch.tensor(plan.rows[0].weights).unsqueeze(1)

    plan, table, more = weighed(1.5)
    place = plan.fragments[0].without[0].hidden[0]
    plain = table[plan.rows[0].unit]
    assert torch.allclose(more, stretched(plan, table, plan.rows[0].unit), atol=1e-5)
    assert torch.equal(more[:place], plain[:place])
    assert not torch.allclose(more[place], plain[place], atol=1e-3)

    plan, table, half = weighed(0.5)
    with_it, without = (stretched(plan, table, unit) for unit in (plan.rows[0].unit, plan.fragments[0].without[0]))
    assert torch.allclose(half, (with_it + without) / 2, atol=1e-5)

    plan, table, none = weighed(0.0)
    without = stretched(plan, table, plan.fragments[0].without[0])
    assert torch.allclose(none, without, atol=1e-3)
    assert not torch.allclose(none, plain, atol=1e-2)


def test_rows_that_no_weight_touches_come_back_untouched(sides: Mapping[str, Side]) -> None:
    side = sides["clip"]
    plan = side.plan([("red", 0.5), ("circle " * 100, 1.0)], "hidden")
    table = side.table(plan)
    first, second = apply(plan, table.__getitem__)
    assert second is table[plan.rows[1].unit]
    assert not torch.equal(first, table[plan.rows[0].unit])


def test_half_precision_units_are_weighted_in_float32(sides: Mapping[str, Side]) -> None:
    side = sides["clip"]
    plan = side.plan([("a red", 0.5), ("circle", 1.4)], "hidden")
    half = {unit: value.bfloat16() for unit, value in side.table(plan).items()}
    (got,) = apply(plan, half.__getitem__)
    (exact,) = apply(plan, {unit: value.float() for unit, value in half.items()}.__getitem__)
    assert got.dtype is torch.float32
    assert torch.equal(got, exact)


def test_a_row_that_ends_with_its_text_stands_against_the_first_tokens_of_the_empty_one(
    sides: Mapping[str, Side],
) -> None:
    """PixArt's and AuraFlow's rows have the length of their text; one empty row serves them all."""
    side = sides["t5"]
    whole = side.plan([("a", 1.0), ("red", 1.5)], "hidden")
    ids = whole.rows[0].unit.token_ids
    length = ids.index(side.tokenizer.eos) + 1
    short = WeightedRow(replace(whole.rows[0].unit, token_ids=ids[:length]), whole.rows[0].weights[:length])
    plan = wanted(Weighting.COMPEL, [short], whole.empty)
    table = {unit: side.tower.encode([Row.of(unit, side.tower.outputs)])[0]["hidden"] for unit in plan.units}
    (got,) = apply(plan, table.__getitem__)
    plain, empty = table[short.unit], table[whole.empty][:length]
    assert torch.allclose(got, empty + (plain - empty) * torch.tensor(short.weights).unsqueeze(1), atol=1e-5)


def test_a_sweep_of_a_weight_reads_what_is_there(sides: Mapping[str, Side]) -> None:
    """Ten weights, one forward."""
    side = sides["clip"]
    table = side.table(side.plan([("a", 1.0), ("red", 0.7), ("circle", 1.0)], "hidden"))
    forwards = side.tower.forwards
    swept = []
    for weight in (-1.0, 0.0, 0.2, 0.5, 0.9, 1.0, 1.1, 1.3, 1.6, 2.0):
        plan = side.plan([("a", 1.0), ("red", weight), ("circle", 1.0)], "hidden")
        swept.append(apply(plan, table.__getitem__)[0])
    assert side.tower.forwards == forwards
    assert all(not torch.allclose(one, other, atol=1e-4) for one, other in pairwise(swept))


def test_a_missing_unit_is_an_error(sides: Mapping[str, Side]) -> None:
    side = sides["clip"]
    plan = side.plan([("red", 0.5)], "hidden")
    table = side.table(plan)
    for unit in plan.units:
        with pytest.raises(KeyError):
            apply(plan, {key: value for key, value in table.items() if key != unit}.__getitem__)
