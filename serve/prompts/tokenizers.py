"""The tokenizers of CLIP, T5 and UMT5, as rows of token ids. Equal to the stock pipelines' ones, token by token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer, LlamaTokenizer, T5Tokenizer

from serve.models import TextPart
from serve.models.tensor_tables import Kind
from serve.models.text_tokenizers import check_files
from serve.models.weight_files import naming, refused

_PART = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no whole character."""
_CLIP_WORD_END, _T5_SPACE = "</w>", "\N{LOWER ONE EIGHTH BLOCK}"
_T5_BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text's token ids without special tokens. `starts[i]` is the index in the text at which token i begins.

    A character that became several tokens is the start of each of them.
    """

    ids: tuple[int, ...]
    starts: tuple[int, ...]


class PromptTokenizer:
    """Text -> token ids -> the row that the encoder reads: begin, ids, end, padding. Safe to share between threads.

    Owns: the Rust tokenizer, with padding and truncation switched off for good.

    T5 has no begin token, CLIP has one; what a tokenizer of Llama's kind, UMT5's, puts before and after a text is a
    matter of its configuration. The padding is the folder's own: SDXL's and SD 3's second tokenizer, as Stable
    Diffusion 2's, pads with "!", not with the end token. `unknown` stands for text outside the vocabulary.
    """

    def __init__(self, part: TextPart) -> None:
        """Reads local files only. Raises OperatorError that names the model's `source` where they make no tokenizer."""
        with naming(part.setting):
            whole = _load(part.tokenizer, part.kind)
            self.eos = _known(whole.eos_token_id, "end", part.tokenizer)
            self.pad = _known(whole.pad_token_id, "padding", part.tokenizer)
            self.before, self.after = _around(whole, part)
        self.kind = part.kind
        self.unknown: int | None = whole.unk_token_id
        self._rust = whole.backend_tokenizer
        self._rust.no_padding()
        self._rust.no_truncation()

    def room(self, length: int) -> int:
        """Tokens of text that fit into a row of `length`: 75 of CLIP's 77, 511 of T5's 512."""
        return length - len(self.before) - len(self.after)

    def tokenize(self, text: str) -> Tokens:
        encoding = self._rust.encode(text, add_special_tokens=False)
        return Tokens(tuple(encoding.ids), tuple(start for start, _ in encoding.offsets))

    def span(self, row: Sequence[int]) -> tuple[int, int]:
        """Where the text of a row begins and where it ends, between the special tokens."""
        first, last = len(self.before), len(row)
        while last > first and row[last - 1] == self.pad:
            last -= 1
        if self.after and last > first and row[last - 1] == self.eos:
            last -= 1
        return first, last

    def spelled(self, ids: Sequence[int]) -> tuple[str, ...]:
        """What each of these ids stands for, spaces included. Of a character that became several tokens, all but the
        last one are empty."""
        spelled, open_from = [], 0
        for at, token in enumerate(ids):
            piece = self._piece(token)
            if piece is None:  # bytes: a character may end with this one
                text = self._rust.decode(list(ids[open_from : at + 1]), skip_special_tokens=False)
                piece = "" if text.endswith(_PART) else text.strip() + self._word_end(token)
                open_from = open_from if text.endswith(_PART) else at + 1
            else:
                open_from = at + 1
            spelled.append(piece)
        return tuple(spelled)

    def _piece(self, token: int) -> str | None:
        """None where it is a part of a character."""
        written: str = self._rust.id_to_token(token) or ""
        if self.kind == "clip":
            text = self._rust.decode([token], skip_special_tokens=False).strip()
            return None if _PART in text else text + self._word_end(token)
        return None if _T5_BYTE.fullmatch(written) else written.replace(_T5_SPACE, " ")

    def _word_end(self, token: int) -> str:
        """A CLIP says with a word's last token that it is one."""
        return " " if (self._rust.id_to_token(token) or "").endswith(_CLIP_WORD_END) else ""

    def row(self, ids: tuple[int, ...], length: int) -> tuple[int, ...]:
        """`length` ids in all. `ids` must fit."""
        spare = self.room(length) - len(ids)
        if spare < 0:
            raise ValueError(f"{len(ids)} tokens in a row for {self.room(length)}")
        return (*self.before, *ids, *self.after, *(self.pad,) * spare)


def _load(folder: Path, kind: Kind) -> Any:
    """transformers' tokenizer. It makes up an empty one where files are gone since the model was checked."""
    check_files(folder, kind)
    classes: Mapping[Kind, Any] = {"clip": CLIPTokenizer, "t5": T5Tokenizer, "umt5": LlamaTokenizer}
    try:
        return classes[kind].from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust side raises bare Exception
        raise refused(f"{folder} can't be loaded as a {kind} tokenizer ({type(error).__name__})") from error


def _around(whole: Any, part: TextPart) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens before and after a text. At least one is needed: the empty text is a row too."""
    begin, end = whole.bos_token_id, whole.eos_token_id
    if part.kind != "umt5":
        return (begin,) if part.kind == "clip" else (), (end,)
    empty = whole("")["input_ids"]
    if empty not in ([begin], [end], [begin, end]):
        raise refused(f"{part.tokenizer} puts neither a begin nor an end around a text")
    return tuple(empty[: begin in empty]), tuple(empty[begin in empty :])


def _known(token: int | None, role: str, folder: Path) -> int:
    if token is None:
        raise refused(f"{folder} has no {role} token")
    return token
