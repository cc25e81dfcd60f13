"""What serve/memory predicts of a phase, beside what is found: counted for published models, measured for small."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffusers import AutoencoderKL

from serve.bench.footprints import CLASSES, Phase, allocated, built, coded, counted, denoised
from serve.memory.activations import decode_bytes, encode_bytes, step_bytes
from serve.memory.shapes import published
from serve.memory.terms import Dtype, ModelShape
from serve.memory.weights import upcasts_vae, vae_dtype
from serve.models.denoiser import FLOAT16

_LINEAR = {"num_layers": 3, "num_attention_heads": 4}
_SMALL: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": [32, 64, 128, 128], "cross_attention_dim": 96},
    "sdxl": {
        "block_out_channels": [32, 64, 128],
        "transformer_layers_per_block": [1, 1, 2],
        "attention_head_dim": [1, 2, 4],
        "cross_attention_dim": 256,
    },
    "sd35-medium": {**_LINEAR, "caption_projection_dim": 256, "pos_embed_max_size": 96, "dual_attention_layers": [0]},
    "sd35-large": {**_LINEAR, "caption_projection_dim": 256, "pos_embed_max_size": 96},
    "flux-dev": {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2},
    "pixart-sigma": {**_LINEAR, "cross_attention_dim": 288},
    "auraflow": {
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 2,
        "num_attention_heads": 1,
        "caption_projection_dim": 256,
    },
}
"""Over the configuration of a published model: the same architecture with fewer layers and channels."""
_SMALL_VAE = [16, 32, 64, 64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Bytes of one phase beside the weights, predicted and found. `tile` is None where nothing is tiled."""

    model: str
    phase: str
    dtype: Dtype
    width: int
    height: int
    lanes: int
    tile: int | None
    predicted: int
    found: int

    @property
    def error(self) -> float:
        """Above 0 where more was predicted."""
        return self.predicted / self.found - 1


def small_shapes() -> Iterator[ModelShape]:
    """One of each architecture, which a CPU computes in a second."""
    for name, over in _SMALL.items():
        shape = published()[name]
        vae = {**shape.vae, "block_out_channels": _SMALL_VAE, "norm_num_groups": 8}
        yield replace(shape, name=f"{name}, small", denoiser={**shape.denoiser, **over}, vae=vae)


def trained_dtype(shape: ModelShape) -> Dtype:
    return "float16" if shape.family in FLOAT16 else "bfloat16"


def counted_steps(shape: ModelShape, sizes: Iterable[tuple[int, int]], dtype: Dtype) -> Iterator[Row]:
    """One guided image's step, as a GPU has it."""
    model = built(CLASSES[shape.family], shape.denoiser, dtype)
    for width, height in sizes:
        predicted = step_bytes(shape, dtype, width, height, shape.lanes)
        found = counted(model, denoised(shape, dtype, width, height, shape.lanes))
        yield _row(shape, "step", dtype, (width, height), None, predicted, found)


def counted_vae(shape: ModelShape, sizes: Iterable[tuple[int, int, int]]) -> Iterator[Row]:
    """Decoding and encoding, as a GPU has them, in the dtype that the VAE of a half-precision model has; `sizes` are
    width, height and the side of a tile."""
    yield from _vae_rows(shape, trained_dtype(shape), sizes, on_gpu=True)


def allocated_step(shape: ModelShape, width: int, height: int) -> Row:
    """In float32, computed on the CPU."""
    model = built(CLASSES[shape.family], shape.denoiser, "float32", "cpu")
    predicted = step_bytes(shape, "float32", width, height, shape.lanes, copies=False)
    found = allocated(model, denoised(shape, "float32", width, height, shape.lanes))
    return _row(shape, "step", "float32", (width, height), None, predicted, found)


def allocated_vae(shape: ModelShape, sizes: Iterable[tuple[int, int, int]]) -> Iterator[Row]:
    """As `counted_vae`, in float32, computed on the CPU."""
    yield from _vae_rows(shape, "float32", sizes, on_gpu=False)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| model | phase | dtype | size | lanes | predicted | found | error |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        phase = row.phase if row.tile is None else f"{row.phase}, tiles of {row.tile}"
        lines.append(
            f"| {row.model} | {phase} | {row.dtype} | {row.width} x {row.height} | {row.lanes} "
            f"| {row.predicted / 1e6:.1f} MB | {row.found / 1e6:.1f} MB | {percent(row.error)} |"
        )
    return "\n".join(lines)


def percent(share: float) -> str:
    """With a sign, and none where it is rounded to nothing."""
    return f"{100 * share:+.1f} %" if round(100 * share, 1) else "0.0 %"


def _vae_rows(shape: ModelShape, dtype: Dtype, sizes: Iterable[tuple[int, int, int]], *, on_gpu: bool) -> Iterator[Row]:
    phases: list[tuple[Phase, Dtype, Callable[..., int]]] = [
        ("decode", vae_dtype(shape, dtype), decode_bytes),
        ("encode", "float32" if upcasts_vae(shape) else dtype, encode_bytes),
    ]
    for phase, computed, predict in phases:
        vae = built(AutoencoderKL, shape.vae, computed, "meta" if on_gpu else "cpu")
        for width, height, tile in sizes:
            predicted = predict(shape, dtype, width, height, tile, copies=on_gpu)
            call = coded(shape, computed, width, height, tile, phase)
            found = counted(vae, call) if on_gpu else allocated(vae, call)
            tiled = tile if width * height > tile * tile else None
            yield _row(shape, phase, computed, (width, height), tiled, predicted, found)


def _row(
    shape: ModelShape, phase: str, dtype: Dtype, size: tuple[int, int], tile: int | None, predicted: int, found: int
) -> Row:
    return Row(
        model=shape.name,
        phase=phase,
        dtype=dtype,
        width=size[0],
        height=size[1],
        lanes=shape.lanes if phase == "step" else 1,
        tile=tile,
        predicted=predicted,
        found=found,
    )
