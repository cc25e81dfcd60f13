"""The text encoder itself: one batched forward over many rows. Nothing else in the product runs a text model."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from serve.devices import check_dtype
from serve.domain.text import FIRST_CONCEPT_ID, EncodeUnit
from serve.encoders.reads import Read, parse_output
from serve.encoders.registry import Encoder
from serve.encoders.shard import devices_here, plan_map, spread
from serve.encoders.trunk import Trunk
from serve.encoders.weights import load_trunk
from serve.errors import OperatorError
from serve.quantize import BITS, quantize

log = logging.getLogger(__name__)

TRIAL_TOKENS = 8
"""Length of the rows that an encoder of any length is tried with at start."""
GRAPHS = 64
"""Compiled graphs of one layer's code that a process keeps: a few for each encoder that it has loaded."""


class ConceptTable(Protocol):
    """Learned vectors, by the digests that units name them with."""

    def vectors(self, digests: Sequence[str]) -> torch.Tensor:
        """(count, width), in float32 on the CPU: those of each digest, one below the other. Raises BackendUnavailable
        for a digest that no file has."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one row of a forward is made of: `token_ids`, `concepts` and `hidden` are an `EncodeUnit`'s. `extra` is an
    output beside the standing ones: a clip skip that no model reads unasked."""

    token_ids: tuple[int, ...]
    extra: str | None = None
    concepts: tuple[str, ...] = ()
    hidden: tuple[int, ...] = ()

    @classmethod
    def of(cls, unit: EncodeUnit, standing: Collection[str]) -> Row:
        """The row that gives `unit` where `standing` outputs are given anyway."""
        extra = None if unit.output in standing else unit.output
        return cls(unit.token_ids, extra, unit.concepts, unit.hidden)

    def unit(self, encoder: str, output: str, salt: str) -> EncodeUnit:
        """The unit that an output of this row is."""
        return EncodeUnit(encoder, self.token_ids, output, salt, self.concepts, self.hidden)

    @property
    def plain(self) -> Row:
        """What is computed, whoever reads which output of it."""
        return Row(self.token_ids, None, self.concepts, self.hidden)


class TextTower:
    """One text encoder, loaded.

    `fingerprint` is the `encoder` of the units that it may encode, `outputs` are those that every row is given,
    `width` is the hidden states'. `nbytes` are the bytes of its weights. `forwards` counts forward passes, `rows` the
    rows of ids that they computed.

    Owns: the text model's weights, on its device or devices. Not thread-safe: one caller at a time.
    """

    def __init__(
        self, encoder: Encoder, trunk: Trunk, device: torch.device, concepts: ConceptTable | None = None
    ) -> None:
        self.name = encoder.name
        self.fingerprint = encoder.fingerprint
        self.outputs = encoder.outputs
        self.width = encoder.part.width
        self.nbytes = trunk.nbytes()
        self.forwards = 0
        self.rows = 0
        self._trunk = trunk
        self._device = device
        self._concepts = concepts
        self._vocab_size = encoder.part.vocab_size
        self._pools = encoder.part.kind == "clip"
        for output in self.outputs:
            self._read(output)

    @classmethod
    def load(cls, encoder: Encoder, device: str, concepts: ConceptTable | None = None) -> TextTower:
        """The encoder as its settings want it, on a device as torch names it. Without `concepts` it knows none. Raises
        OperatorError.

        It names the model's `source` and the tensor where the weights are not the encoder's, and the setting where
        this machine can't do what it says; quantized and compiled towers are tried before anybody asks them.
        """
        wanted, place = encoder.settings, torch.device(device)
        check_dtype(place, wanted.dtype, encoder.setting("dtype"))
        trunk = load_trunk(encoder.part, getattr(torch, wanted.dtype), dict(encoder.projections))
        places = devices_here(place.type) if wanted.shard else ()
        if wanted.shard and len(places) < 2:
            log.warning("only one device to spread a text encoder over", extra={"encoder": encoder.name})
        if wanted.quantization != "none":
            _quantize(encoder, trunk, torch.device("cpu") if len(places) > 1 else place)
        tower = cls(encoder, trunk, place, concepts)
        if len(places) > 1:
            spread(trunk.model, plan_map(trunk.model, places))
        else:
            trunk.model.to(place)
        end = places[-1] if len(places) > 1 else place
        trunk.projections = {name: each.to(end) for name, each in trunk.projections.items()}
        if wanted.compile:
            _compile(trunk)
        for field in ("quantization",) * (wanted.quantization != "none") + ("compile",) * wanted.compile:
            tower._try(encoder, field)
        return tower

    @torch.inference_mode()
    def encode(self, rows: Sequence[Row]) -> list[dict[str, torch.Tensor]]:
        """Per row, in order, the standing outputs and its extra one, by name: tensors on the CPU in the run dtype,
        (tokens, width), pooled and projected ones (width,). Equal rows are computed once.

        Raises ValueError where rows differ in length, or name an output, a token or a position that this encoder does
        not have, and what the table of concepts raises.
        """
        if not rows:
            return []
        plain = [row.plain for row in rows]
        distinct = list(dict.fromkeys(plain))
        names = tuple(dict.fromkeys((*self.outputs, *(row.extra for row in rows if row.extra is not None))))
        reads = [self._read(name) for name in names]
        ids = self._ids(distinct)
        vectors, hidden = self._vectors(distinct, ids), self._hidden(distinct, ids)
        self.forwards += 1
        self.rows += len(distinct)
        with self._stance():
            values = self._trunk.forward(ids.to(self._device), reads, vectors, hidden)
        table = {name: value.cpu().unbind() for name, value in zip(names, values, strict=True)}
        places = {row: place for place, row in enumerate(distinct)}
        return [
            {
                name: table[name][places[own]]
                for name in dict.fromkeys((*self.outputs, *([row.extra] if row.extra is not None else [])))
            }
            for row, own in zip(rows, plain, strict=True)
        ]

    def _stance(self) -> AbstractContextManager[None]:
        """What is not compiled by now (a T5 row of one token, a batch with hidden words) runs as it is: no request
        waits for a compiler."""
        return torch.compiler.set_stance("eager_on_recompile") if self._trunk.dynamic else nullcontext()

    def _ids(self, rows: Sequence[Row]) -> torch.Tensor:
        """(rows, tokens). What is out of range is said here: on a GPU it would end the process."""
        if len({len(row.token_ids) for row in rows}) > 1:
            raise ValueError("the rows of one forward must have one length")
        length, most = len(rows[0].token_ids), self._trunk.rows_up_to
        if not length or (most is not None and length > most):
            raise ValueError(f"a row of {length} tokens does not fit this text encoder")
        ids = torch.tensor([row.token_ids for row in rows])
        if int(ids.min()) < 0 or bool(((ids >= self._vocab_size) & (ids < FIRST_CONCEPT_ID)).any()):
            raise ValueError(f"token ids must be below {self._vocab_size}")
        return ids

    def _vectors(self, rows: Sequence[Row], ids: torch.Tensor) -> torch.Tensor | None:
        """Those of all rows' concepts, one below the other; None where no row has any. Each row counts its own from
        FIRST_CONCEPT_ID on: `ids` are moved to where they are found here."""
        tables: list[torch.Tensor] = []
        before = 0
        for row, own in zip(rows, ids, strict=True):
            learned = own >= FIRST_CONCEPT_ID
            table = torch.empty(0, self.width)
            if row.concepts and self._concepts is not None:
                table = self._concepts.vectors(row.concepts)
            if table.shape[1] != self.width or int(own.max()) - FIRST_CONCEPT_ID >= len(table):
                raise ValueError(f"{len(row.concepts)} concepts don't give a row the vectors that it reads")
            own[learned] += before
            before += len(table)
            tables.append(table)
        return torch.cat(tables) if before else None

    def _hidden(self, rows: Sequence[Row], ids: torch.Tensor) -> torch.Tensor | None:
        """(rows, tokens); None where nothing is hidden, so that the layers need no mask."""
        if not any(row.hidden for row in rows):
            return None
        if not all(0 <= place < ids.shape[1] for row in rows for place in row.hidden):
            raise ValueError("a row has no such position to hide")
        hidden = torch.zeros(ids.shape, dtype=torch.bool)
        for row, own in zip(rows, hidden, strict=True):
            own[list(row.hidden)] = True
        return hidden.to(self._device)

    def _read(self, output: str) -> Read:
        read = parse_output(output, len(self._trunk.layers))
        if (read.pooled and not self._pools) or (
            read.projection is not None and read.projection not in self._trunk.projections
        ):
            raise ValueError(f"text encoder {self.name} has no output {output!r}")
        return read

    @torch.inference_mode()
    def _try(self, encoder: Encoder, field: str) -> None:
        """Compile for one row and for several, and find out now what does not work here."""
        length = self._trunk.rows_up_to or TRIAL_TOKENS
        try:
            for rows in (2, 1):
                ids = torch.zeros((rows, length), dtype=torch.long, device=self._device)
                self._trunk.forward(ids, [self._read(output) for output in self.outputs])
        except Exception as error:
            raise _refused(field, encoder, f"does not work here ({type(error).__name__})") from error


def _refused(field: str, encoder: Encoder, reason: str) -> OperatorError:
    """`field` is one of `EncoderSettings`."""
    setting = encoder.setting(field)
    return OperatorError(f"{setting}: {reason} (text encoder {encoder.name})", setting)


def _quantize(encoder: Encoder, trunk: Trunk, device: torch.device) -> None:
    kind = encoder.settings.quantization
    try:
        quantize(trunk.layers, BITS[kind], device)
    except ImportError as error:
        reason = f"{kind} needs the package bitsandbytes: pip install 'tandem-serve[quantization]'"
        raise _refused("quantization", encoder, reason) from error
    except (ValueError, RuntimeError, NotImplementedError) as error:
        reason = f"{kind} does not work on {device.type} here ({type(error).__name__})"
        raise _refused("quantization", encoder, reason) from error


def _compile(trunk: Trunk) -> None:
    """Layer by layer: they share their code, so that one graph serves all of them, to any depth that is read."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    trunk.dynamic = True
    for layer in trunk.layers:
        layer.compile(fullgraph=True)
