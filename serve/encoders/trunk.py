"""The transformer of a text encoder, layer by layer, so that one pass gives any of its outputs.

The modules and their weights are transformers' (`modeling_clip.py`, `modeling_t5.py`, `modeling_umt5.py`); only the
loop over them is ours. It stops after the deepest layer that is asked for. Nothing here keeps gradients from flowing:
`serve.learning` trains the vectors of a concept through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from serve.domain.text import FIRST_CONCEPT_ID
from serve.encoders.reads import Read


class Trunk:
    """A `CLIPTextModel`, `T5EncoderModel` or `UMT5EncoderModel`, and the text projections that are read behind it.

    `rows_up_to` is the longest row that it has positions for, None where there is no end. `dynamic` says that the
    layers are compiled. The modules may lie on several devices: what goes from one to the next is moved by
    accelerate's hooks on them; `projections` lie with the final norm.
    """

    layers: Sequence[nn.Module]
    rows_up_to: int | None

    def __init__(self, model: Any, dtype: torch.dtype, projections: dict[str, torch.Tensor]) -> None:
        self.model = model
        self.dtype = dtype
        self.projections = projections
        self.dynamic = False

    def forward(
        self,
        ids: torch.Tensor,
        reads: Sequence[Read],
        vectors: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """`ids` is (rows, tokens). One tensor per read, in order and in the run dtype: (rows, tokens, width), for
        pooled reads (rows, width or the projection's).

        `vectors` (count, width) stand in the place of tokens: the id FIRST_CONCEPT_ID + n reads row n of them. `hidden`
        (rows, tokens) is true where no token of the row looks, and None where all look everywhere.
        """
        words = ids if vectors is None else ids.masked_fill(ids >= FIRST_CONCEPT_ID, 0)
        embedded = self._embed(words)
        if vectors is not None:
            numbers = ids.to(embedded.device) - FIRST_CONCEPT_ID
            learned = vectors.to(embedded)[numbers.clamp(min=0)]
            embedded = torch.where((numbers >= 0).unsqueeze(-1), learned, embedded)
        mask = None if hidden is None else self._mask(hidden)
        states = self._states(self._place(embedded), mask, {read.depth for read in reads})
        normed = {depth: self._norm(states[depth]) for depth in {read.depth for read in reads if read.norm}}
        values = [self._take(words, read, normed if read.norm else states) for read in reads]
        return [value.to(self.dtype) for value in values]

    def nbytes(self) -> int:
        """Bytes of the weights; what several modules share counts once."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.projections.values()]
        return sum(each.nbytes for each in {id(each): each for each in tensors}.values())

    def _take(self, ids: torch.Tensor, read: Read, states: dict[int, torch.Tensor]) -> torch.Tensor:
        state = states[read.depth]
        if not read.pooled:
            return state
        ends = self._ends(ids).to(state.device)
        vector = state[torch.arange(len(state), device=state.device), ends]
        if read.projection is None:
            return vector
        return nn.functional.linear(vector, self.projections[read.projection])

    def _states(self, embedded: torch.Tensor, mask: torch.Tensor | None, depths: set[int]) -> dict[int, torch.Tensor]:
        """Hidden states by the number of layers behind them; 0 is the embedding."""
        state, carried = embedded, None
        kept = {0: state} if 0 in depths else {}
        for depth in range(1, max(depths) + 1):
            if self.dynamic:
                self._mark(state, carried)
            state, carried = self._layer(depth - 1, state, mask, carried)
            if depth in depths:
                kept[depth] = state
        return kept

    def _mark(self, state: torch.Tensor, carried: torch.Tensor | None) -> None:
        """Tell the compiler which sizes change from call to call. It can't take 1 for a size that changes, so that one
        row has graphs of its own, and several rows, however many, share one."""
        if state.shape[0] > 1:
            torch._dynamo.mark_dynamic(state, 0)
        if self.rows_up_to is None and state.shape[1] > 1:
            torch._dynamo.mark_dynamic(state, 1)
            if carried is not None:
                torch._dynamo.mark_dynamic(carried, (2, 3))

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, width): the vocabulary's vectors."""
        raise NotImplementedError

    def _place(self, embedded: torch.Tensor) -> torch.Tensor:
        """The same with what the encoder adds for a token's position."""
        return embedded

    def _mask(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the layers take: true where a token of the third axis looks at one of the last, (rows, 1, 1 or tokens,
        tokens)."""
        return ~hidden[:, None, None, :]

    def _layer(
        self, index: int, state: torch.Tensor, mask: torch.Tensor | None, carried: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`carried` is what a layer hands to the next one beside the hidden state."""
        raise NotImplementedError

    def _norm(self, state: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _ends(self, ids: torch.Tensor) -> torch.Tensor:
        """Where each row's text ends."""
        raise ValueError("this encoder has no pooled output")


class ClipTrunk(Trunk):
    def __init__(self, model: Any, dtype: torch.dtype, projections: dict[str, torch.Tensor]) -> None:
        super().__init__(model, dtype, projections)
        self.layers = list(model.encoder.layers)
        self.rows_up_to = int(model.config.max_position_embeddings)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        table = self.model.embeddings.token_embedding
        embedded: torch.Tensor = table(ids.to(table.weight.device))  # no hook lies on it alone
        return embedded

    def _place(self, embedded: torch.Tensor) -> torch.Tensor:
        placed: torch.Tensor = self.model.embeddings(inputs_embeds=embedded)
        return placed

    def _mask(self, hidden: torch.Tensor) -> torch.Tensor:
        """Causal too: it takes the place of the layers' own."""
        tokens = hidden.shape[1]
        return super()._mask(hidden) & torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device).tril()

    def _layer(
        self, index: int, state: torch.Tensor, mask: torch.Tensor | None, carried: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Causal, and unless words are hidden no other mask: the families were trained with padding read like text.
        return self.layers[index](state, mask, is_causal=True), None

    def _norm(self, state: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.model.final_layer_norm(state)
        return normed

    def _ends(self, ids: torch.Tensor) -> torch.Tensor:
        """The first end-of-text token. `eos_token_id` 2 in a configuration is an old mistake, which stands for the
        largest id of the row; the stock model's rule is the same."""
        end = self.model.config.eos_token_id
        return ids.argmax(-1) if end == 2 else (ids == end).int().argmax(-1)


class T5Trunk(Trunk):
    def __init__(self, model: Any, dtype: torch.dtype, projections: dict[str, torch.Tensor]) -> None:
        super().__init__(model, dtype, projections)
        self.layers = list(model.encoder.block)
        self.rows_up_to = None

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.model.encoder.embed_tokens(ids)
        return embedded

    def _layer(
        self, index: int, state: torch.Tensor, mask: torch.Tensor | None, carried: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # `carried` is the bias by distance, (1, heads, tokens, tokens): the first block computes it for all of them.
        state, bias, _ = self.layers[index](state, mask, carried)
        return state, bias

    def _norm(self, state: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.model.encoder.final_layer_norm(state)
        return normed


class Umt5Trunk(T5Trunk):
    def _layer(
        self, index: int, state: torch.Tensor, mask: torch.Tensor | None, carried: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Every block has a bias by distance of its own.
        return self.layers[index](state, mask), None
