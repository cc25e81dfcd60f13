"""Whether a tokenizer is the one that a text encoder was trained with, as far as its files tell. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve.models.weight_files import read_json, refused

_END = "<|endoftext|>"
_T5_PADDING = 256
"""T5's embedding is padded to a multiple of 128 rows, with the 100 sentinels among them or, in some files, missing."""


def check_clip_tokenizer(folder: Path, vocab_size: int, end: int) -> None:
    """As many tokens as the encoder has, and the same end of text. Raises OperatorError.

    `end` is the encoder's `eos_token_id`; 2 stands in old configurations for the largest id of a row
    (https://github.com/huggingface/transformers/pull/24773).
    """
    whole = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        ids = _vocabulary(folder, {"model": {"vocab": read_json(folder / "vocab.json")}}, "BPE")
    elif whole:
        ids = _vocabulary(folder, whole, "BPE")
    else:
        raise refused(f"{folder} holds neither tokenizer.json nor vocab.json and merges.txt")
    ids |= _added(folder, whole)
    size = max(ids.values(), default=-1) + 1
    if size != vocab_size:
        raise refused(f"{folder} knows {size} tokens, the text encoder {vocab_size}")
    written = _end_token(folder)
    if end != 2 and ids.get(written) != end:
        raise refused(
            f"{folder} ends a text with {ids.get(written)} ({written}), the text encoder with {end} (eos_token_id)"
        )


def check_t5_tokenizer(folder: Path, vocab_size: int) -> None:
    """Every id has its row in the embedding, and nearly every row its id. Raises OperatorError."""
    if not (folder / "tokenizer.json").is_file():
        raise refused(f"{folder} holds no tokenizer.json")
    whole = read_json(folder / "tokenizer.json")
    ids = _vocabulary(folder, whole, "Unigram") | _added(folder, whole)
    size = max(ids.values(), default=-1) + 1
    if not size <= vocab_size < size + _T5_PADDING:
        raise refused(f"{folder} knows {size} tokens, the text encoder {vocab_size}")


def _vocabulary(folder: Path, whole: Mapping[str, Any], kind: str) -> dict[str, int]:
    """Token -> id: a BPE's is a table, a Unigram's a list of (token, score)."""
    model = whole.get("model")
    found = model.get("type", "BPE") if isinstance(model, dict) else None
    if not isinstance(model, dict) or found != kind:
        raise refused(f"{folder} holds a {found} tokenizer, not a {kind} one")
    vocabulary: Any = model.get("vocab")
    try:
        if kind == "Unigram":
            return {str(token): index for index, (token, _) in enumerate(vocabulary)}
        return {str(token): int(index) for token, index in vocabulary.items()}
    except (AttributeError, TypeError, ValueError):
        raise refused(f"{folder / 'tokenizer.json'} garbles its vocabulary") from None


def _added(folder: Path, whole: Mapping[str, Any]) -> dict[str, int]:
    try:
        return {str(added["content"]): int(added["id"]) for added in whole.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError):
        raise refused(f"{folder / 'tokenizer.json'} garbles its added_tokens") from None


def _end_token(folder: Path) -> str:
    """The end token as transformers finds it: tokenizer_config.json, then special_tokens_map.json, then CLIP's own."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file() and (token := read_json(folder / name).get("eos_token")):
            return str(token.get("content") if isinstance(token, dict) else token)
    return _END
