import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.domain import ImageRequest
from serve.errors import InvalidRequest
from serve.models import SHIPPED
from serve.prompts.plan import Planner
from serve.prompts.tokenizers import PromptTokenizer

TOKENIZER = PromptTokenizer(SHIPPED)
PLANNER = Planner(TOKENIZER, "encoder")


def request(prompt: str, negative: str = "", guidance: float = 5.0) -> ImageRequest:
    return ImageRequest(
        model="m",
        prompt=prompt,
        negative_prompt=negative,
        width=128,
        height=128,
        num_inference_steps=1,
        guidance_scale=guidance,
        seed=0,
    )


def test_plain_prompt_is_one_row_a_side() -> None:
    plan = PLANNER.plan(request("a red circle", "blurry"))
    assert plan.units == (*plan.positive.units, *plan.negative.units)
    assert [unit.token_ids for unit in plan.units] == [
        TOKENIZER.row(TOKENIZER.tokenize(text).ids) for text in ("a red circle", "blurry")
    ]
    assert plan.positive.weights == (1.0,) * 77
    assert plan.truncated == ()


def test_weights_change_no_unit() -> None:
    plain, weighted = (PLANNER.plan(request(text)) for text in ("a red circle", "a (red:1.5) [circle]"))
    assert plain.units == weighted.units
    assert [unit.key for unit in plain.units] == [unit.key for unit in weighted.units]


def test_weights_lie_on_their_tokens() -> None:
    plan = PLANNER.plan(request("a (red:1.5) circle"))
    before, inside = len(TOKENIZER.tokenize("a ").ids), len(TOKENIZER.tokenize("red").ids)
    expected = [1.0] * (1 + before) + [1.5] * inside
    assert list(plan.positive.weights) == expected + [1.0] * (77 - len(expected))


def test_no_guidance_encodes_no_negative() -> None:
    plan = PLANNER.plan(request("red", "blue", guidance=1.0))
    assert plan.negative is None
    assert plan.units == plan.positive.units


def test_equal_sides_are_one_unit() -> None:
    assert len(PLANNER.plan(request("", "")).units) == 1


def test_truncation_tells_the_text_that_was_cut() -> None:
    head = "red " * (75 // len(TOKENIZER.tokenize("red").ids))
    plan = PLANNER.plan(request(head + "Blue (STAR:1.2), moon", "green"))
    (cut,) = plan.truncated
    assert (cut.field, cut.limit) == ("prompt", 75)
    assert cut.text == "Blue STAR, moon"
    assert cut.tokens == 75 + len(TOKENIZER.tokenize("Blue STAR, moon").ids)
    assert len(plan.positive.weights) == len(plan.positive.units[0].token_ids) == 77


def test_truncation_inside_a_weighted_span_and_a_word() -> None:
    text = "x" * 3 + "y" * 200
    plan = PLANNER.plan(request(f"({text}:1.3)", "n"))
    (cut,) = plan.truncated
    start = TOKENIZER.tokenize(text).starts[75]
    assert cut.text == text[start:]
    assert plan.positive.weights[1:76] == (1.3,) * 75


def test_both_sides_are_told() -> None:
    plan = PLANNER.plan(request("red " * 100, "blue " * 100))
    assert [cut.field for cut in plan.truncated] == ["prompt", "negative_prompt"]


def test_seventy_five_tokens_are_not_truncated() -> None:
    assert len(TOKENIZER.tokenize(",").ids) == 1
    assert PLANNER.plan(request(", " * 75)).truncated == ()
    (cut,) = PLANNER.plan(request(", " * 76)).truncated
    assert (cut.tokens, cut.text) == (76, ",")


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_errors_name_the_side(guidance: float) -> None:
    with pytest.raises(InvalidRequest) as raised:
        PLANNER.plan(request("a", "b AND c", guidance))
    assert raised.value.param == "negative_prompt"


@given(st.lists(st.sampled_from(["red", "(blue:1.5)", "[x]", "😀", "star's", ",", "qqq"]), max_size=120))
def test_rows_and_reports_always_fit(words: list[str]) -> None:
    prompt = " ".join(words)
    plan = PLANNER.plan(request(prompt))
    (unit,) = plan.positive.units
    assert len(unit.token_ids) == len(plan.positive.weights) == 77
    assert unit.token_ids[0] == TOKENIZER.bos
    assert plan == PLANNER.plan(request(prompt))
    for cut in plan.truncated:
        assert cut.tokens > cut.limit == 75
        assert cut.text
        assert TOKENIZER.tokenize(cut.text).ids[-1] == _ids(prompt)[-1]


def _ids(prompt: str) -> tuple[int, ...]:
    plain = prompt.translate(str.maketrans("", "", "()[]")).replace(":1.5", "")
    return TOKENIZER.tokenize(plain).ids
