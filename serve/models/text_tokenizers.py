"""Whether a tokenizer is the one that a text encoder was trained with, as far as its files tell. Nothing is loaded.

The rules by which several files make one tokenizer are those of transformers 5 (`_from_pretrained` in
https://github.com/huggingface/transformers/blob/main/src/transformers/tokenization_utils_base.py, then `__init__` in
tokenization_utils_tokenizers.py), so that what is checked is what is loaded:

- tokenizer.json comes before vocab.json and merges.txt.
- Where tokenizer_config.json has `added_tokens_decoder`, added and special tokens are what that file says. Else
  special_tokens_map.json goes over it, and tokens are added by added_tokens.json and tokenizer.json.
- An added token that the vocabulary lacks gets the next id, whatever id its file says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve.models.tensor_tables import Kind
from serve.models.weight_files import read_json, refused

_MODELS: Mapping[Kind, str] = {"clip": "BPE", "t5": "Unigram", "umt5": "BPE"}
"""UMT5 as AuraFlow has it: EleutherAI's, with the tokenizer of Llama."""
_SPECIAL: Mapping[Kind, Mapping[str, str | None]] = {
    "clip": {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "sep_token": None,
        "pad_token": "<|endoftext|>",
        "cls_token": None,
        "mask_token": None,
    },
    "t5": {
        "bos_token": None,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sep_token": None,
        "pad_token": "<pad>",
        "cls_token": None,
        "mask_token": None,
    },
    "umt5": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sep_token": None,
        "pad_token": None,
        "cls_token": None,
        "mask_token": None,
    },
}
"""Special tokens by their role, in transformers' order, with its defaults. Those without a role are among the added
tokens in all that transformers saves."""
_T5_PADDING = 256
"""T5's embedding is padded to a multiple of 128 rows, with the 100 sentinels among them or, in some files, missing."""


def check_clip_tokenizer(folder: Path, vocab_size: int, end: int) -> None:
    """As many tokens as the encoder has, and the same end of text. Raises OperatorError.

    `end` is the encoder's `eos_token_id`; 2 stands in old configurations for the largest id of a row
    (https://github.com/huggingface/transformers/pull/24773).
    """
    ids, special = _ids(folder, "clip")
    size = max(ids.values(), default=-1) + 1
    if size != vocab_size:
        raise refused(f"{folder} knows {size} tokens, the text encoder {vocab_size}")
    written = special.get("eos_token", "no token")
    if end != 2 and ids.get(written) != end:
        raise refused(
            f"{folder} ends a text with {ids.get(written)} ({written}), the text encoder with {end} (eos_token_id)"
        )


def check_t5_tokenizer(folder: Path, vocab_size: int, kind: Kind) -> None:
    """Every id has its row in the embedding, and nearly every row its id. Raises OperatorError."""
    ids, _ = _ids(folder, kind)
    size = max(ids.values(), default=-1) + 1
    if not size <= vocab_size < size + _T5_PADDING:
        raise refused(f"{folder} knows {size} tokens, the text encoder {vocab_size}")


def check_files(folder: Path, kind: Kind) -> None:
    """Raises OperatorError where the vocabulary is missing: transformers would make up an empty one."""
    if (folder / "tokenizer.json").is_file():
        return
    if kind != "clip":
        alone = "spiece.model" if kind == "t5" else "tokenizer.model"
        raise refused(f"{folder} holds no tokenizer.json; {alone} alone is not read")
    if not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise refused(f"{folder} holds neither tokenizer.json nor vocab.json and merges.txt")


def _ids(folder: Path, kind: Kind) -> tuple[dict[str, int], dict[str, str]]:
    """Token -> id with the added tokens, and the special tokens by their role."""
    check_files(folder, kind)
    file = folder / "tokenizer.json"
    whole = read_json(file) if file.is_file() else {"model": {"vocab": read_json(folder / "vocab.json")}}
    ids = _vocabulary(folder, whole, _MODELS[kind])
    settings = dict(_optional(folder / "tokenizer_config.json"))
    if "added_tokens_decoder" in settings:
        added = _added(folder / "tokenizer_config.json", settings)
    else:
        settings |= _optional(folder / "special_tokens_map.json")
        added = _added(folder / "added_tokens.json", _optional(folder / "added_tokens.json"))
        added |= _added(file, whole)
    written = {role: settings.get(role, default) for role, default in _SPECIAL[kind].items()}
    special = {role: _text(token) for role, token in written.items() if token}
    size = max(ids.values(), default=-1) + 1
    for token in (*(added[index] for index in sorted(added)), *special.values()):
        if token not in ids:
            ids[token], size = size, size + 1
    return ids, special


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
        raise refused(f"{folder} garbles its vocabulary") from None


def _added(file: Path, content: Mapping[str, Any]) -> dict[int, str]:
    """Id -> token, as one of three files writes it: by id, as a list, or by token."""
    try:
        if file.name == "tokenizer_config.json":
            return {int(index): str(added["content"]) for index, added in content["added_tokens_decoder"].items()}
        if file.name == "tokenizer.json":
            return {int(added["id"]): str(added["content"]) for added in content.get("added_tokens") or ()}
        return {int(index): str(token) for token, index in content.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise refused(f"{file} garbles its added_tokens") from None


def _optional(file: Path) -> Mapping[str, Any]:
    return read_json(file) if file.is_file() else {}


def _text(token: Any) -> str:
    return str(token.get("content") if isinstance(token, dict) else token)
