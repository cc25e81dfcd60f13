"""The tables of docs/performance.md, "Memory, predicted and measured". A minute on one core.

python scripts/memory_table.py            write them
python scripts/memory_table.py --print    show them
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import diffusers
import torch

from serve.bench.footprint_report import (
    allocated_step,
    allocated_vae,
    counted_steps,
    counted_vae,
    small_shapes,
    table,
    trained_dtype,
)
from serve.memory.shapes import published, shape_of
from serve.models import resolve
from serve.settings.pools import ModelSettings

DOCUMENT = Path(__file__).parent.parent / "docs/performance.md"
VAE_SIZES = [(512, 512, 1024), (1024, 1024, 1024), (1536, 1536, 1024), (1024, 1024, 512)]


def counted() -> str:
    rows = []
    for shape in published().values():
        wide, high = shape.default_width, shape.default_height
        rows += counted_steps(shape, [(wide, high), (wide * 3 // 2, high)], trained_dtype(shape))
    for name in ("sd15", "sdxl"):  # in float16 and in float32; the others' decoders have the same channels
        rows += counted_vae(published()[name], VAE_SIZES)
    return table(rows)


def allocated() -> str:
    shipped = shape_of(resolve(ModelSettings(source="shapes"), Path()))
    rows = [allocated_step(shipped, 256, 256), *allocated_vae(shipped, [(256, 256, 256), (256, 256, 128)])]
    rows += (allocated_step(shape, 512, 512) for shape in small_shapes())
    return table([*rows, *allocated_vae(next(small_shapes()), [(512, 512, 512), (512, 512, 256)])])


def main() -> int:
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, rows in (("counted", counted()), ("allocated", allocated())):
        if "--print" in sys.argv[1:]:
            print(rows)
        marks = f"<!-- memory-{name}:begin -->", f"<!-- memory-{name}:end -->"
        pattern = re.compile(f"{marks[0]}.*{marks[1]}", re.DOTALL)
        text = pattern.sub(lambda _, rows=rows, marks=marks: f"{marks[0]}\n{rows}\n{marks[1]}", text)
    if "--print" not in sys.argv[1:]:
        DOCUMENT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
