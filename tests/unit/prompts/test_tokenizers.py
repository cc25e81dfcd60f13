import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer, LlamaTokenizerFast, T5TokenizerFast

from serve.errors import OperatorError
from serve.models.folder import SHIPPED, ModelFolder
from serve.models.text_parts import TextPart
from serve.prompts.tokenizers import PromptTokenizer

ROLES = [
    *[("sd", "text_encoder"), ("sdxl", "text_encoder_2"), ("sd3", "text_encoder_3"), ("flux", "text_encoder_2")],
    ("auraflow", "text_encoder"),
]
"""A plain CLIP, one that pads with "!", two T5s, a UMT5."""
CLASSES = {"clip": CLIPTokenizer, "t5": T5TokenizerFast, "umt5": LlamaTokenizerFast}
TEXTS = [
    "",
    " ",
    "a red circle on a blue background",
    "  A   RED\tcircle\n ",
    "it's the cat's, isn't it?! 3.14",
    "ein großer grüner Kreis, 緑の星 😀🏳️‍🌈 é é ﬁ ½",
    "x" * 500,
    "red, " * 300,
    "<|endoftext|> red <|startoftext|>",
    "a</s> b <pad><extra_id_0> <unk>",
    "!!! red!",
]


@pytest.fixture(scope="session")
def pairs(models: Mapping[str, ModelFolder]) -> list[tuple[PromptTokenizer, Any]]:
    """Ours, and what the stock pipeline loads. Llama's pads before the text, which matters to nobody who hides it."""
    found = []
    for model, role in ROLES:
        (part,) = (part for part in models[model].text if part.role == role)
        whole = CLASSES[part.kind].from_pretrained(part.tokenizer, padding_side="right")
        found.append((PromptTokenizer(part), whole))
    return found


def assert_equal_to_transformers(tokenizer: PromptTokenizer, whole: CLIPTokenizer, text: str) -> None:
    ids = tokenizer.tokenize(text).ids
    assert list(ids) == whole(text, add_special_tokens=False).input_ids
    for length in (77,) if tokenizer.kind == "clip" else (-tokenizer.room(0), 16, 77, 512):
        row = whole(text, padding="max_length", truncation=True, max_length=length, add_special_tokens=True).input_ids
        assert list(tokenizer.row(ids[: tokenizer.room(length)], length)) == row


@pytest.mark.parametrize("which", range(len(ROLES)), ids=lambda which: "-".join(ROLES[which]))
@pytest.mark.parametrize("text", TEXTS)
def test_rows_equal_transformers(pairs, which: int, text: str) -> None:
    assert_equal_to_transformers(*pairs[which], text)


@settings(deadline=None)
@given(
    text=st.text()
    | st.lists(st.sampled_from(["red", "Circle", "on", ",", "'s", " ", "é", "\n", "!", "</s>", "ﬁ"])).map(" ".join)
)
def test_any_row_equals_transformers(pairs, text: str) -> None:
    for tokenizer, whole in pairs:
        assert_equal_to_transformers(tokenizer, whole, text)


def test_starts_point_into_the_text_as_written(pairs) -> None:
    text = "  RED   circle,\ngrün"
    for tokenizer, _ in pairs:
        tokens = tokenizer.tokenize(text)
        words = [text[start:].lstrip() for start in tokens.starts]
        assert words[0].startswith("RED")
        assert list(tokens.starts) == sorted(tokens.starts)
        assert {"circle,\ngrün", ",\ngrün", "grün"} <= set(words)


def test_a_row_has_no_room_for_more(tokenizer: PromptTokenizer) -> None:
    assert tokenizer.room(77) == 75
    with pytest.raises(ValueError, match="76 tokens"):
        tokenizer.row((1,) * 76, 77)


def moved(part: TextPart, folder: Path) -> TextPart:
    shutil.copytree(part.tokenizer, folder)
    return replace(part, tokenizer=folder)


def test_vocabulary_and_merges_alone_are_enough(tmp_path: Path, shipped: ModelFolder, tokenizer) -> None:
    """Stable Diffusion's own repositories have no tokenizer.json."""
    part = moved(shipped.text[0], tmp_path / "tokenizer")
    (part.tokenizer / "tokenizer.json").unlink()
    slow = PromptTokenizer(part)
    for text in TEXTS:
        assert slow.tokenize(text).ids == tokenizer.tokenize(text).ids
    assert slow.row((), 77) == tokenizer.row((), 77)


def test_padding_is_the_folders_own(tmp_path: Path, shipped: ModelFolder) -> None:
    """Stable Diffusion 2 pads with "!", not with the end token, and many folders don't tell their row length."""
    part = moved(shipped.text[0], tmp_path / "tokenizer")
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = json.loads((part.tokenizer / file).read_text())
        settings.pop("model_max_length", None)
        (part.tokenizer / file).write_text(json.dumps(settings | {"pad_token": "!"}))
    other, whole = PromptTokenizer(part), CLIPTokenizer.from_pretrained(part.tokenizer)
    assert other.pad == whole.convert_tokens_to_ids("!") != other.eos
    row = whole("a red star", padding="max_length", truncation=True, max_length=77).input_ids
    assert list(other.row(other.tokenize("a red star").ids, 77)) == row


def test_t5_without_tokenizer_json_is_refused(tmp_path: Path, models: Mapping[str, ModelFolder]) -> None:
    """transformers would make up an empty vocabulary, and every prompt would be `<unk>`."""
    part = moved(models["flux"].text[1], tmp_path / "tokenizer_2")
    (part.tokenizer / "tokenizer.json").rename(part.tokenizer / "spiece.model")
    with pytest.raises(OperatorError, match=r"model.source: .*tokenizer_2 holds no tokenizer.json"):
        PromptTokenizer(part)


@pytest.mark.parametrize(("begin", "end"), [(True, True), (True, False), (False, True)])
def test_what_is_around_a_text_of_umt5_is_the_folders_own(
    tmp_path: Path, models: Mapping[str, ModelFolder], begin: bool, end: bool
) -> None:
    part = llama(models, tmp_path, begin, end)
    ours, whole = PromptTokenizer(part), LlamaTokenizerFast.from_pretrained(part.tokenizer, padding_side="right")
    assert (ours.before, ours.after) == ((ours.before[0],) if begin else (), (ours.eos,) if end else ())
    for text in TEXTS:
        assert_equal_to_transformers(ours, whole, text)


def test_a_text_with_nothing_around_it_is_refused(tmp_path: Path, models: Mapping[str, ModelFolder]) -> None:
    with pytest.raises(OperatorError, match=r"model.source: .*puts neither a begin nor an end around a text"):
        PromptTokenizer(llama(models, tmp_path, False, False))


def llama(models: Mapping[str, ModelFolder], folder: Path, begin: bool, end: bool) -> TextPart:
    part = models["auraflow"].text[0]
    whole = LlamaTokenizerFast.from_pretrained(part.tokenizer, add_bos_token=begin, add_eos_token=end)
    whole.save_pretrained(folder)
    return replace(part, tokenizer=folder)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "BPE", "vocab": 3}}'])
def test_a_broken_file_is_refused_by_name(
    tmp_path: Path, shipped: ModelFolder, models: Mapping[str, ModelFolder], content: str
) -> None:
    for number, part in enumerate((shipped.text[0], models["flux"].text[1])):
        broken = moved(part, tmp_path / f"tokenizer_{number}")
        (broken.tokenizer / "tokenizer.json").write_text(content)
        with pytest.raises(OperatorError, match=rf"model.source: .*tokenizer_{number}.* tokenizer") as raised:
            PromptTokenizer(broken)
        assert raised.value.param == "model.source"


def test_no_files_are_refused(tmp_path: Path, shipped: ModelFolder) -> None:
    with pytest.raises(OperatorError, match=r"holds neither tokenizer\.json nor vocab\.json and merges\.txt"):
        PromptTokenizer(replace(shipped.text[0], tokenizer=tmp_path))


def test_the_shipped_row_is_transformers_row(tokenizer: PromptTokenizer) -> None:
    whole = CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")
    for text in TEXTS:
        assert_equal_to_transformers(tokenizer, whole, text)
