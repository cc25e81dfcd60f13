"""CLIP's tokenizer, as rows of token ids. Equal to transformers' CLIPTokenizer, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPTokenizer

from serve.models import ROW_TOKENS


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text's token ids without special tokens. `starts[i]` is the index in the text at which token i begins.

    A character that became several tokens is the start of each of them.
    """

    ids: tuple[int, ...]
    starts: tuple[int, ...]


class PromptTokenizer:
    """Text -> token ids -> the fixed-length row that the encoder reads. Safe to share between threads.

    Owns: the Rust tokenizer, with padding and truncation switched off for good.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is a diffusers folder; its `tokenizer` holds `tokenizer.json`, or `vocab.json` and `merges.txt`."""
        whole = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self.bos: int = whole.bos_token_id
        self.eos: int = whole.eos_token_id
        self.pad: int = whole.pad_token_id
        self._rust = whole.backend_tokenizer
        self._rust.no_padding()
        self._rust.no_truncation()

    @property
    def limit(self) -> int:
        """Tokens of text that fit into one row: 75 of 77."""
        return ROW_TOKENS - 2

    def tokenize(self, text: str) -> Tokens:
        encoding = self._rust.encode(text, add_special_tokens=False)
        return Tokens(tuple(encoding.ids), tuple(start for start, _ in encoding.offsets))

    def row(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Begin, ids, end, padding: ROW_TOKENS ids in all. `ids` must fit."""
        if len(ids) > self.limit:
            raise ValueError(f"{len(ids)} tokens in a row for {self.limit}")
        return (self.bos, *ids, self.eos, *(self.pad,) * (self.limit - len(ids)))
