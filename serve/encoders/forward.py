"""The text encoder itself: one batched forward over many units. Nothing else in the product runs a text model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from serve.domain import EncodeUnit
from serve.encoders.unit import fingerprint
from serve.models.weight_files import refused


class TextTower:
    """Owns: the text model's weights, on one device. Not thread-safe: one caller at a time.

    `fingerprint` is the `encoder` of the units that it may encode; `forwards` counts forward passes, `rows` the rows
    of ids that they computed.
    """

    def __init__(self, model: Any, device: str, encoder: str) -> None:
        self._model = model
        self._device = device
        self.fingerprint = encoder
        self.forwards = 0
        self.rows = 0

    @classmethod
    def load(cls, folder: Path, device: str, dtype: str) -> TextTower:
        """`folder` is a diffusers folder, `dtype` a torch dtype's name. OperatorError names `model.source`."""
        transformers_logging.disable_progress_bar()
        try:
            model, report = CLIPTextModel.from_pretrained(
                folder / "text_encoder",
                dtype=getattr(torch, dtype),
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise refused(f"{folder / 'text_encoder'} can't be loaded ({type(error).__name__})") from error
        if missing := sorted(report["missing_keys"]):
            # transformers would go on with random numbers in their place.
            raise refused(f"{folder / 'text_encoder'} lacks weights: {missing[0]} and {len(missing) - 1} more")
        return cls(model.to(device).eval(), device, fingerprint(folder, dtype))

    @torch.inference_mode()
    def encode(self, units: Sequence[EncodeUnit]) -> list[torch.Tensor]:
        """One (77, width) tensor on the CPU per unit, in order; equal units are computed once.

        Raises ValueError for an output that this tower can't give. Rows of one call must have one length.
        """
        wanted = tuple(dict.fromkeys(units))
        if not wanted:
            return []
        if unknown := {unit.output for unit in wanted} - {"hidden"}:
            raise ValueError(f"unknown encoder output {sorted(unknown)}")
        ids = torch.tensor([unit.token_ids for unit in wanted], device=self._device)
        self.forwards += 1
        self.rows += len(wanted)
        # No attention mask, as Stable Diffusion was trained: padding is read like text.
        hidden = self._model(input_ids=ids).last_hidden_state.cpu()
        table = dict(zip(wanted, hidden.unbind(), strict=True))
        return [table[unit] for unit in units]
