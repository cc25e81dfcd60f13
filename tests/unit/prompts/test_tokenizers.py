import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from serve.models import SHIPPED
from serve.prompts.tokenizers import PromptTokenizer

SHARED = PromptTokenizer(SHIPPED)
WHOLE = CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")
TEXTS = [
    "",
    "a red circle on a blue background",
    "  A   RED\tcircle\n ",
    "it's the cat's, isn't it?! 3.14",
    "ein großer grüner Kreis, 緑の星 😀🏳️‍🌈 é é",
    "x" * 500,
    "red, " * 100,
    "<|endoftext|> red <|startoftext|>",
]


def assert_equal_to_transformers(tokenizer: PromptTokenizer, text: str) -> None:
    ids = tokenizer.tokenize(text).ids
    assert list(ids) == WHOLE(text, add_special_tokens=False).input_ids
    row = WHOLE(text, padding="max_length", truncation=True, max_length=77).input_ids
    assert list(tokenizer.row(ids[: tokenizer.limit])) == row


@pytest.mark.parametrize("text", TEXTS)
def test_rows_equal_transformers(tokenizer: PromptTokenizer, text: str) -> None:
    assert_equal_to_transformers(tokenizer, text)


@given(st.text() | st.lists(st.sampled_from(["red", "Circle", "on", ",", "'s", " ", "é", "\n"])).map(" ".join))
def test_any_row_equals_transformers(text: str) -> None:
    assert_equal_to_transformers(SHARED, text)


def test_starts_point_into_the_text_as_written(tokenizer: PromptTokenizer) -> None:
    text = "  RED   circle,\ngrün"
    tokens = tokenizer.tokenize(text)
    assert text[tokens.starts[0] :].startswith("RED")
    assert list(tokens.starts) == sorted(tokens.starts)
    whole_words = {text.index("RED"), text.index("circle"), text.index(","), text.index("grün")}
    assert whole_words <= set(tokens.starts)


def test_a_row_has_no_room_for_more(tokenizer: PromptTokenizer) -> None:
    assert tokenizer.limit == 75
    with pytest.raises(ValueError, match="76 tokens"):
        tokenizer.row((1,) * 76)


def test_vocabulary_and_merges_alone_are_enough(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    """Stable Diffusion's own repositories have no tokenizer.json."""
    shutil.copytree(SHIPPED / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    slow = PromptTokenizer(tmp_path)
    for text in TEXTS:
        assert slow.tokenize(text).ids == tokenizer.tokenize(text).ids
    assert slow.row(()) == tokenizer.row(())


def test_padding_is_the_folders_own(tmp_path: Path) -> None:
    """Stable Diffusion 2 pads with "!", not with the end token, and many folders don't tell their row length."""
    shutil.copytree(SHIPPED / "tokenizer", tmp_path / "tokenizer")
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = json.loads((tmp_path / "tokenizer" / file).read_text())
        settings.pop("model_max_length", None)
        (tmp_path / "tokenizer" / file).write_text(json.dumps(settings | {"pad_token": "!"}))
    other, whole = PromptTokenizer(tmp_path), CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert other.pad == whole.convert_tokens_to_ids("!") != other.eos
    row = whole("a red star", padding="max_length", truncation=True, max_length=77).input_ids
    assert list(other.row(other.tokenize("a red star").ids)) == row
