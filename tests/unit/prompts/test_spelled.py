"""Token ids -> what they stand for, and where the text of a row lies."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.prompts.plan import Planner
from serve.prompts.tokenizers import PromptTokenizer

FAMILIES = ["sd", "sdxl", "sd3", "auraflow"]


@pytest.fixture(scope="module")
def tokenizers(planners: Mapping[str, Planner]) -> list[PromptTokenizer]:
    """CLIP, OpenCLIP whose padding is a sign of its own, T5, UMT5."""
    return [tokenizer for family in FAMILIES for tokenizer in planners[family].tokenizers.values()]


def test_words_are_spelled_as_they_were_written(tokenizers: list[PromptTokenizer]) -> None:
    for tokenizer in tokenizers:
        ids = tokenizer.tokenize("a red circle").ids
        spelled = tokenizer.spelled(ids)
        assert len(spelled) == len(ids)
        assert " ".join("".join(spelled).split()) == "a red circle"


def test_a_character_of_several_tokens_is_told_once(tokenizers: list[PromptTokenizer]) -> None:
    clip = tokenizers[0]
    ids = clip.tokenize("☂").ids
    assert len(ids) > 1, "the test would see nothing"
    spelled = clip.spelled(ids)
    assert [text.strip() for text in spelled] == [*[""] * (len(ids) - 1), "☂"]
    assert "".join(clip.spelled(clip.tokenize("a ☂ b").ids)).split() == ["a", "☂", "b"]


@given(st.text(max_size=20), st.integers(0, 5))
def test_the_text_of_a_row_is_between_its_special_tokens(
    tokenizers: list[PromptTokenizer], text: str, spare: int
) -> None:
    for tokenizer in tokenizers:
        ids = tokenizer.tokenize(text).ids
        if tokenizer.eos in ids or (tokenizer.pad in ids and not tokenizer.after):
            continue  # of a text that spells a special token nobody can say where it ends
        around = len(tokenizer.before) + len(tokenizer.after)
        row = tokenizer.row(ids, len(ids) + around + spare)
        first, last = tokenizer.span(row)
        assert row[first:last] == ids


@given(st.lists(st.integers(0, 300), max_size=12))
def test_any_ids_are_spelled(tokenizers: list[PromptTokenizer], ids: list[int]) -> None:
    for tokenizer in tokenizers:
        assert len(tokenizer.spelled(ids)) == len(ids)
