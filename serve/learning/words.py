"""Captions -> what the denoiser reads, through frozen text encoders and vectors that learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from serve.domain.conditioning import TextEmbedding
from serve.domain.text import FIRST_CONCEPT_ID
from serve.encoders.concept_files import MAX_VECTORS
from serve.encoders.reads import parse_output
from serve.encoders.weights import load_trunk
from serve.errors import OperatorError
from serve.learning.captions import PLACE
from serve.models import ModelFolder, TextPart
from serve.models.text_parts import ROW_TOKENS
from serve.prompts.families import READS, VECTORS
from serve.prompts.tokenizers import PromptTokenizer

NOISE = 0.1
"""Spread of the vectors about where they begin, as a share of the vocabulary's: no two of them begin as one."""
_OWN = "own"


class Reader:
    """One text encoder of a model. It computes in float32, whatever the denoiser does.

    `table` is the vocabulary's embedding, (words, width).

    Owns: the encoder's weights, which never change.
    """

    def __init__(self, part: TextPart, outputs: Sequence[str], device: torch.device) -> None:
        """Raises OperatorError naming the model's `source`."""
        self.role = part.role
        self.tokenizer = PromptTokenizer(part)
        projected = "projected" in outputs
        self._trunk = load_trunk(part, torch.float32, {_OWN: part} if projected else {})
        self._trunk.model.to(device)
        self._trunk.projections = {name: each.to(device) for name, each in self._trunk.projections.items()}
        self._outputs = tuple(outputs)
        self._reads = [
            parse_output(f"projected:{_OWN}" if each == "projected" else each, part.layers) for each in outputs
        ]
        self._device = device

    @property
    def table(self) -> torch.Tensor:
        table: torch.Tensor = self._trunk.model.get_input_embeddings().weight
        return table

    def row(self, caption: str, vectors: int) -> tuple[int, ...]:
        """The row of token ids that a planner makes of it, where a concept of so many vectors stands at each `{}`.
        Raises OperatorError for a caption that is longer than a row: what is cut might be the concept."""
        marks = tuple(range(FIRST_CONCEPT_ID, FIRST_CONCEPT_ID + vectors))
        ids: list[int] = []
        for index, piece in enumerate(caption.split(PLACE)):
            ids += marks if index else ()
            ids += self.tokenizer.tokenize(piece).ids
        room = self.tokenizer.room(ROW_TOKENS)
        if len(ids) > room:
            raise OperatorError(f"caption: {caption!r} has {len(ids)} tokens, {room} fit into a row", "caption")
        return self.tokenizer.row(tuple(ids), ROW_TOKENS)

    def read(self, rows: Sequence[tuple[int, ...]], vectors: torch.Tensor) -> dict[str, torch.Tensor]:
        """By output, (rows, tokens, width) or (rows, width). Gradients flow to `vectors` (n, width), and nowhere else.

        Equal rows are computed once.
        """
        index = {row: place for place, row in enumerate(dict.fromkeys(rows))}
        ids = torch.tensor(list(index), device=self._device)
        places = torch.tensor([index[row] for row in rows], device=self._device)
        values = self._trunk.forward(ids, self._reads, vectors)
        return {name: value[places] for name, value in zip(self._outputs, values, strict=True)}


class Words:
    """All text encoders of a model of the Stable Diffusion families, and the vectors of one concept for each of them.

    Owns: the vectors, by role; (n, width) each, float32, on the device.
    """

    def __init__(
        self, model: ModelFolder, device: torch.device, init: str, vectors: int | None, generator: torch.Generator
    ) -> None:
        """The vectors begin as the words of `init`, or, where that is empty, as the mean of the vocabulary. `vectors`
        is how many there are, by default one for each token of `init`.

        Raises OperatorError naming `init` or `vectors`, or the model's `source`.
        """
        self._readers = [Reader(part, READS[model.family][part.role], device) for part in model.text]
        self.vectors = {
            reader.role: nn.Parameter(_begin(reader, init, vectors, generator).to(device)) for reader in self._readers
        }
        self._zeroes = model.zero_empty_negative

    @property
    def count(self) -> int:
        """Vectors of the concept for one encoder."""
        return len(next(iter(self.vectors.values())))

    @property
    def spread(self) -> float:
        """Root mean square of a value of the vocabularies: what a learning rate is measured by."""
        return max(float(reader.table.square().mean().sqrt()) for reader in self._readers)

    def check(self, caption: str) -> None:
        """Raises OperatorError for a caption that does not fit."""
        for reader in self._readers:
            reader.row(caption, self.count)

    def read(self, captions: Sequence[str], vectors: Mapping[str, torch.Tensor]) -> list[TextEmbedding]:
        """Their embeddings on the device, unweighted, with gradients. `vectors`, by role, are what stands at `{}`."""
        contexts: list[torch.Tensor] = []
        pooled: list[torch.Tensor] = []
        for reader in self._readers:
            rows = [reader.row(caption, self.count) for caption in captions]
            for output, value in reader.read(rows, vectors[reader.role]).items():
                (pooled if output in VECTORS else contexts).append(value)
        context = torch.cat(contexts, -1)
        beside = torch.cat(pooled, -1) if pooled else None
        return [
            TextEmbedding(context[index], None if beside is None else beside[index]) for index in range(len(captions))
        ]

    def nothing(self) -> TextEmbedding:
        """What stands for no negative prompt: zeros where the stock pipeline has them, else the empty text."""
        (empty,) = self.read([""], self.vectors)
        if not self._zeroes:
            return empty
        return TextEmbedding(
            torch.zeros_like(empty.context), None if empty.pooled is None else torch.zeros_like(empty.pooled)
        )


def _begin(reader: Reader, init: str, vectors: int | None, generator: torch.Generator) -> torch.Tensor:
    """(n, width), float32 on the CPU. More vectors than words go round the words again."""
    table = reader.table.float().cpu()
    tokens = reader.tokenizer.tokenize(init).ids
    count = max(1, len(tokens)) if vectors is None else vectors
    if not 1 <= count <= MAX_VECTORS:
        raise OperatorError(f"vectors: must be between 1 and {MAX_VECTORS}", "vectors")
    if count < len(tokens):
        raise OperatorError(f"init: {init!r} is {len(tokens)} tokens, for {count} vectors", "init")
    spread = table.square().mean().sqrt()
    noise = NOISE * spread * torch.randn(count, table.shape[1], generator=generator)
    if not tokens:
        return table.mean(0) + noise
    noise[: len(tokens)] = 0
    return table[[tokens[index % len(tokens)] for index in range(count)]] + noise
