"""Text towers with the settings that a test wants, and rows for them."""

from dataclasses import replace

import torch

from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import Encoder
from serve.settings.pools import EncoderSettings


def make(
    encoder: Encoder, outputs: tuple[str, ...] | None = None, *, device: str = "cpu", **options: object
) -> TextTower:
    return TextTower.load(
        replace(encoder, outputs=outputs or encoder.outputs, settings=EncoderSettings(**options)), device
    )


def all_outputs(encoder: Encoder) -> tuple[str, ...]:
    skips = [f"skip:{n}{norm}" for n in range(encoder.part.layers + 1) for norm in ("", ":norm")]
    pooled = ["pooled"] if encoder.part.kind == "clip" else []
    return ("hidden", *skips, *pooled, *(f"projected:{name}" for name, _ in encoder.projections))


def random_rows(encoder: Encoder, count: int, length: int | None = None, seed: int = 0) -> list[Row]:
    """Ids below the last, which ends the text of a CLIP row somewhere in its middle and pads it."""
    length = length or encoder.part.row_tokens or 19
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, encoder.part.vocab_size - 1, (count, length), generator=generator)
    if encoder.part.kind == "clip":
        for row, end in zip(ids, torch.randint(1, length, (count,), generator=generator).tolist(), strict=True):
            row[end:] = encoder.part.vocab_size - 1
    return [Row(tuple(row)) for row in ids.tolist()]


def cosines(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Per token."""
    return torch.nn.functional.cosine_similarity(found.float(), expected.float(), dim=-1)
