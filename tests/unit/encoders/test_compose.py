from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from serve.domain.conditioning import Phase, Schedule, TextEmbedding
from serve.domain.text import EncodeUnit, Weighting
from serve.encoders.codec import pack
from serve.encoders.compose import compose
from serve.encoders.export import conditioning_at
from serve.encoders.weighting import emphasize, multiply
from serve.errors import InvalidRequest
from serve.prompts.planned import Block, Column, PromptPlan, TextPlan, UnitRead, Vector, Window
from serve.prompts.wanted import Wanted, WeightedRow

ALONE = Phase(0, ((1.0, ((1.0, 0),)),))
GUIDED = Phase(0, ((1.0, ((1.0, 0),)),), ((1.0, 1),))


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows(mean: float) -> torch.Tensor:
    values = noise(77, 64, seed=1)
    return values - values.mean() + mean


def weights(**at: float) -> tuple[float, ...]:
    return tuple(at.get(f"t{index}", 1.0) for index in range(77))


def unit(role: str, output: str = "hidden", text: int = 1) -> EncodeUnit:
    return EncodeUnit(role, (text,), output)


def column(*units: EncodeUnit, weights: Sequence[tuple[float, ...] | None] = (), **rest: object) -> Column:
    given = weights or (None,) * len(units)
    wanted = tuple(WeightedRow(each, factors) for each, factors in zip(units, given, strict=True))
    return Column(units[0].encoder, Wanted(Weighting.A1111, wanted), **rest)  # type: ignore[arg-type]


def text(
    *blocks: Block, vectors: Sequence[EncodeUnit] = (), field: str = "prompt", slot: int = 0, zero: bool = False
) -> TextPlan:
    read = tuple(Vector((UnitRead(each.encoder, each),)) for each in vectors)
    return TextPlan(field, (), blocks, read, slot, zero)


def plan(*texts: TextPlan, width: int = 64, phases: tuple[Phase, ...] = (ALONE,), **rest: object) -> PromptPlan:
    return PromptPlan(family="sd", context_width=width, texts=texts, phases=phases, **rest)  # type: ignore[arg-type]


def packed(values: Mapping[EncodeUnit, torch.Tensor]) -> dict[str, bytes]:
    return {each.key: pack(value) for each, value in values.items()}


def test_a_lone_encoder_is_the_context() -> None:
    value = noise(77, 64)
    one, other = unit("clip"), unit("clip", text=2)
    whole = plan(
        text(Block((column(one),), 77)), text(Block((column(other),), 77), field="negative_prompt"), phases=(GUIDED,)
    )
    got = compose(whole, packed({one: value, other: 2 * value}))
    assert torch.equal(got.texts[0].context, value)
    assert torch.equal(got.texts[1].context, 2 * value)
    assert [each.pooled for each in got.texts] == [None, None]
    assert (got.phases, got.time_ids, got.negative_time_ids) == ((GUIDED,), None, None)


def test_sdxl_lies_side_by_side_and_its_empty_negative_is_zeros() -> None:
    first, second, vector = noise(77, 48, seed=1), noise(77, 80, seed=2), noise(20, seed=3)
    left, right, pooled = unit("l", "skip:1"), unit("g", "skip:1"), unit("g", "projected:x")
    whole = plan(
        text(Block((column(left), column(right)), 77), vectors=[pooled]),
        text(field="negative_prompt", zero=True),
        width=128,
        phases=(GUIDED,),
        time_ids=(64, 96, 0, 0, 64, 96),
    )
    got = compose(whole, packed({left: first, right: second, pooled: vector}))
    positive, negative = got.texts
    assert torch.equal(positive.context, torch.cat([first, second], 1))
    assert positive.pooled is not None
    assert torch.equal(positive.pooled, vector)
    assert torch.equal(negative.context, torch.zeros(77, 128))
    assert negative.pooled is not None
    assert torch.equal(negative.pooled, torch.zeros(20))
    assert got.time_ids is not None
    assert got.time_ids.tolist() == [64, 96, 0, 0, 64, 96]
    assert got.time_ids.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sd3_pads_its_clips_and_puts_t5_below(dtype: torch.dtype) -> None:
    left, right, t5 = unit("l", "skip:1"), unit("g", "skip:1"), unit("t5")
    first, second = unit("l", "projected:x"), unit("g", "projected:y")
    values = {
        left: noise(77, 24, dtype=dtype),
        right: noise(77, 40, seed=1, dtype=dtype),
        t5: noise(9, 96, seed=2, dtype=dtype),
        first: noise(20, seed=3, dtype=dtype),
        second: noise(28, seed=4, dtype=dtype),
    }
    clips = Block((column(left), column(right)), 77)
    whole = plan(text(clips, Block((column(t5),), 9), vectors=[first, second]), width=96)
    (got,) = compose(whole, packed(values)).texts
    above = torch.cat([values[left], values[right], torch.zeros(77, 32, dtype=dtype)], 1)
    assert torch.equal(got.context, torch.cat([above, values[t5]]).float())
    assert got.pooled is not None
    assert torch.equal(got.pooled, torch.cat([values[first], values[second]]).float())
    assert got.context.dtype is got.pooled.dtype is torch.float32
    without = replace(whole, texts=(text(clips, vectors=[first, second]),), zero_rows=9)
    (left_out,) = compose(without, packed(values)).texts
    assert torch.equal(left_out.context, torch.cat([above, torch.zeros(9, 96)]).float())


def test_rows_lie_below_one_another_and_the_empty_texts_fill_up() -> None:
    first, second, empty = unit("clip"), unit("clip", text=2), unit("clip", text=3)
    values = {first: noise(77, 64), second: noise(77, 64, seed=1), empty: noise(77, 64, seed=2)}
    whole = plan(text(Block((column(first, second, empty=empty, fill=2),), 308)))
    (got,) = compose(whole, packed(values)).texts
    assert torch.equal(got.context, torch.cat([values[first], values[second], values[empty], values[empty]]))


def test_an_empty_text_that_fills_nothing_is_not_asked_for() -> None:
    one = unit("clip")
    whole = plan(text(Block((column(one, empty=unit("clip", text=3)),), 77)))
    assert whole.units == (one,)
    (got,) = compose(whole, packed({one: rows(-0.1)})).texts
    assert torch.equal(got.context, rows(-0.1))


def test_a_place_of_and_is_zeros_above_and_below() -> None:
    """So that the texts of a mix add up to the embeddings below one another."""
    first, second, pooled = unit("clip"), unit("clip", text=2), unit("clip", "pooled")
    values = {first: noise(77, 64), second: noise(77, 64, seed=1), pooled: noise(64, seed=2)}
    mixed = Phase(0, ((1.0, ((1.0, 0), (0.5, 1))),))
    whole = plan(
        text(Block((column(first),), 154), vectors=[pooled]),
        text(Block((column(second),), 154, 77), slot=1),
        phases=(mixed,),
    )
    schedule = compose(whole, packed(values))
    assert torch.equal(schedule.texts[1].context[:77], torch.zeros(77, 64))
    got = conditioning_at(schedule, 0)
    assert torch.equal(got.positive, torch.cat([values[first], 0.5 * values[second]]))
    assert got.pooled is not None
    assert torch.equal(got.pooled, values[pooled])


def test_a_context_is_filled_up_with_zeros() -> None:
    """AuraFlow's; and a text that is shorter than the others of its family's unpadded rows."""
    one = unit("t5")
    whole = plan(text(Block((column(one),), 12)), context_tokens=20)
    (got,) = compose(whole, packed({one: noise(9, 64)})).texts
    assert torch.equal(got.context, torch.cat([noise(9, 64), torch.zeros(11, 64)]))


def test_tokens_that_windows_share_take_the_mean_of_their_embeddings() -> None:
    units = [unit("clip", text=number) for number in range(3)]
    values = [noise(10, 8, seed=number) for number in range(3)]
    windows = Window(0, 1, 8), Window(6, 1, 8), Window(10, 1, 6)
    whole = plan(text(Block((column(*units, windows=windows),), 30)), width=8)
    (got,) = compose(whole, packed(dict(zip(units, values, strict=True)))).texts
    for row, (value, window) in enumerate(zip(values, windows, strict=True)):
        for at in range(10):
            token = at - window.at + window.first
            having = [
                other[token - each.first + each.at]
                for other, each in zip(values, windows, strict=True)
                if each.first <= token < each.first + each.tokens
            ]
            words = window.at <= at < window.at + window.tokens
            expected = torch.stack(having).mean(0) if words else value[at]
            assert torch.allclose(got.context[10 * row + at], expected, atol=1e-6)


def test_shares_are_the_weighted_mean_of_rows_and_vectors() -> None:
    first, second = unit("clip"), unit("clip", text=2)
    vectors = unit("clip", "pooled"), unit("clip", "pooled", text=2)
    values = {first: noise(77, 64), second: noise(77, 64, seed=1), vectors[0]: noise(9), vectors[1]: noise(9, seed=1)}
    one = text(Block((column(first, second, shares=(0.75, 0.25)),), 77))
    reads = tuple(UnitRead("clip", each) for each in vectors)
    (got,) = compose(plan(replace(one, vectors=(Vector(reads, (0.75, 0.25)),))), packed(values)).texts
    assert torch.allclose(got.context, 0.75 * values[first] + 0.25 * values[second], atol=1e-6)
    assert got.pooled is not None
    assert torch.allclose(got.pooled, 0.75 * values[vectors[0]] + 0.25 * values[vectors[1]], atol=1e-6)


def test_a_mean_of_rows_of_unlike_lengths_is_that_of_the_rows_that_go_so_far() -> None:
    first, second = unit("t5"), unit("t5", text=2)
    values = {first: noise(9, 8), second: noise(4, 8, seed=1)}
    whole = plan(text(Block((column(first, second, shares=(0.75, 0.25)),), 9)), width=8)
    (got,) = compose(whole, packed(values)).texts
    assert torch.allclose(got.context[:4], 0.75 * values[first][:4] + 0.25 * values[second], atol=1e-6)
    assert torch.allclose(got.context[4:], values[first][4:], atol=1e-6)


def test_each_encoders_rows_are_weighted_by_themselves() -> None:
    """A1111's rule restores the mean of what one encoder gave for one row, not that of the whole context."""
    first, second, below = unit("l", "skip:1"), unit("g", "skip:1"), unit("l", "skip:1", text=2)
    values = {first: rows(-0.1), second: rows(0.3), below: rows(0.5)}
    left = column(first, below, weights=[weights(t3=1.5), weights(t2=0.5)])
    right = column(second, second, weights=[weights(t4=0.5), None])
    (got,) = compose(plan(text(Block((left, right), 154)), width=128), packed(values)).texts
    assert torch.equal(got.context[:77, :64], emphasize(values[first], weights(t3=1.5)))
    assert torch.equal(got.context[77:, :64], emphasize(values[below], weights(t2=0.5)))
    assert torch.equal(got.context[:77, 64:], emphasize(values[second], weights(t4=0.5)))
    assert torch.equal(got.context[77:, 64:], values[second])


def test_weights_are_exact_in_half_precision() -> None:
    """The arithmetic is float32's, whatever the encoder ran in."""
    value, one = rows(-0.1).bfloat16(), unit("clip")
    whole = plan(text(Block((column(one, weights=[weights(t3=1.5)]),), 77)))
    (got,) = compose(whole, packed({one: value})).texts
    assert torch.equal(got.context, emphasize(value.float(), weights(t3=1.5)))
    assert not torch.equal(got.context, got.context.bfloat16().float())


def test_the_rule_is_the_plans() -> None:
    one = unit("clip")
    wanted = Wanted(Weighting.MULTIPLY, (WeightedRow(one, weights(t3=1.5)),))
    (got,) = compose(plan(text(Block((Column("clip", wanted),), 77))), packed({one: rows(-0.1)})).texts
    assert torch.equal(got.context, multiply(rows(-0.1), weights(t3=1.5)))


def test_texts_that_share_a_unit_do_not_share_what_weights_make_of_it() -> None:
    one = unit("clip")
    weighted = text(Block((column(one, weights=[weights(t3=1.5)]),), 77))
    got = compose(plan(weighted, text(Block((column(one),), 77)), weighted), packed({one: rows(-0.1)})).texts
    assert torch.equal(got[1].context, rows(-0.1))
    assert torch.equal(got[0].context, got[2].context)


def test_a_missing_unit_is_an_error() -> None:
    with pytest.raises(KeyError):
        compose(plan(text(Block((column(unit("clip")),), 77))), {})


def schedule(*phases: Phase) -> Schedule:
    texts = tuple(TextEmbedding(noise(7, 4, seed=seed), noise(5, seed=seed)) for seed in range(3))
    return Schedule(texts, phases, torch.ones(6), torch.zeros(6))


def test_the_conditioning_of_a_step_is_that_of_its_phase() -> None:
    switched = schedule(GUIDED, Phase(5, ((1.0, ((1.0, 2),)),), ((1.0, 1),)))
    for step, index in ((0, 0), (4, 0), (5, 2), (9, 2)):
        got = conditioning_at(switched, step)
        assert got.positive is switched.texts[index].context
        assert got.pooled is switched.texts[index].pooled
        assert got.negative is switched.texts[1].context
    assert (got.time_ids, got.negative_time_ids) == (switched.time_ids, switched.negative_time_ids)


def test_the_conditioning_of_a_mix_is_the_weighted_sum() -> None:
    mixed = schedule(Phase(0, ((1.0, ((0.25, 0), (0.0, 1), (0.75, 2))),)))
    got = conditioning_at(mixed, 3)
    first, _, last = mixed.texts
    assert torch.allclose(got.positive, 0.25 * first.context + 0.75 * last.context)
    assert got.pooled is not None
    assert first.pooled is not None
    assert last.pooled is not None
    assert torch.allclose(got.pooled, 0.25 * first.pooled + 0.75 * last.pooled)
    assert (got.negative, got.negative_pooled) == (None, None)


def test_there_is_no_conditioning_of_a_composition() -> None:
    with pytest.raises(InvalidRequest, match="prompt: AND is several texts at once") as raised:
        conditioning_at(schedule(Phase(0, ((1.0, ((1.0, 0),)), (1.0, ((1.0, 1),))))), 0)
    assert raised.value.param == "prompt"
