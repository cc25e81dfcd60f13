"""The transformer of a text encoder, layer by layer, so that one pass gives any of its outputs.

The modules and their weights are transformers' (`modeling_clip.py`, `modeling_t5.py`, `modeling_umt5.py`); only the
loop over them is ours. It stops after the deepest layer that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

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

    def forward(self, ids: torch.Tensor, reads: Sequence[Read]) -> list[torch.Tensor]:
        """`ids` is (rows, tokens). One tensor per read, in order and in the run dtype: (rows, tokens, width), for
        pooled reads (rows, width or the projection's)."""
        states = self._states(ids, {read.depth for read in reads})
        normed = {depth: self._norm(states[depth]) for depth in {read.depth for read in reads if read.norm}}
        values = [self._take(ids, read, normed if read.norm else states) for read in reads]
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

    def _states(self, ids: torch.Tensor, depths: set[int]) -> dict[int, torch.Tensor]:
        """Hidden states by the number of layers behind them; 0 is the embedding."""
        hidden, carried = self._embed(ids), None
        kept = {0: hidden} if 0 in depths else {}
        for depth in range(1, max(depths) + 1):
            if self.dynamic:
                self._mark(hidden, carried)
            hidden, carried = self._layer(depth - 1, hidden, carried)
            if depth in depths:
                kept[depth] = hidden
        return kept

    def _mark(self, hidden: torch.Tensor, carried: torch.Tensor | None) -> None:
        """Tell the compiler which sizes change from call to call. It can't take 1 for a size that changes, so that one
        row has graphs of its own, and several rows, however many, share one."""
        if hidden.shape[0] > 1:
            torch._dynamo.mark_dynamic(hidden, 0)
        if self.rows_up_to is None and hidden.shape[1] > 1:
            torch._dynamo.mark_dynamic(hidden, 1)
            if carried is not None:
                torch._dynamo.mark_dynamic(carried, (2, 3))

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _layer(
        self, index: int, hidden: torch.Tensor, carried: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`carried` is what a layer hands to the next one beside the hidden state."""
        raise NotImplementedError

    def _norm(self, hidden: torch.Tensor) -> torch.Tensor:
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
        embedded: torch.Tensor = self.model.embeddings(input_ids=ids)
        return embedded

    def _layer(
        self, index: int, hidden: torch.Tensor, carried: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Causal, and no other mask: the families were trained with padding read like text.
        return self.layers[index](hidden, None, is_causal=True), None

    def _norm(self, hidden: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.model.final_layer_norm(hidden)
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
        self, index: int, hidden: torch.Tensor, carried: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # `carried` is the bias by distance, (1, heads, tokens, tokens): the first block computes it for all of them.
        hidden, bias, _ = self.layers[index](hidden, None, carried)
        return hidden, bias

    def _norm(self, hidden: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.model.encoder.final_layer_norm(hidden)
        return normed


class Umt5Trunk(T5Trunk):
    def _layer(
        self, index: int, hidden: torch.Tensor, carried: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Every block has a bias by distance of its own.
        return self.layers[index](hidden, None), None
