"""Measures what the rungs of the memory ladder cost in quality, and writes the tables that docs/memory.md has.

    python scripts/rung_quality.py [--prompts 24] [--only pictures]

Pictures: the shipped model draws held-out prompts on each rung; each is compared with the one of `resident`, and shown
to the judge. Steps: one forward pass of a few layers in the shapes of published models, with random weights, against
the same in float32 with whole weights. Takes two minutes on two cores. No GPU is needed: the arithmetic is the same.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from serve.bench.random_models import random_family
from serve.devices import use_threads
from serve.diffusion import attention
from serve.diffusion.families.base import Family
from serve.diffusion.run import Work
from serve.diffusion.rungs import descend
from serve.diffusion.runner import Runner, open_runner
from serve.diffusion.synthetic import synthetic_lanes
from serve.domain.orders import ImageRequest
from serve.encoders.codec import pack
from serve.encoders.compose import compose
from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import register
from serve.memory.shapes import published
from serve.models import ModelFolder, resolve
from serve.prompts.plan import Planner
from serve.rungs import MEANS, Rung
from serve.settings.pools import DiffusionSettings, ModelSettings
from serve.settings.tree import Settings
from serve.shapes.captions import held_out_prompts
from serve.shapes.draw import Scene, draw
from serve.shapes.judge import agrees, read

DOCUMENT = Path(__file__).parent.parent / "docs/memory.md"
BEGIN, END = "<!-- rung-quality:begin -->\n", "<!-- rung-quality:end -->"
STEPS, GUIDANCE, SIDE, TOGETHER = 20, 3.0, 128, 8
SCORES = 1 << 10
"""Of a slice of attention here: the shipped model's pictures are too small to be cut up by themselves."""
LARGE, LARGE_PICTURES = 1024, 4
CPU = torch.device("cpu")
SETTINGS = DiffusionSettings(device="cpu")
PACKED = (Rung.INT8, Rung.INT4)
FEW: Mapping[str, Mapping[str, Any]] = {
    "sd15": {"layers_per_block": 1},
    "sdxl": {"layers_per_block": 1, "transformer_layers_per_block": [1, 1, 1]},
    "sd35-medium": {"num_layers": 2, "dual_attention_layers": [0]},
    "flux-dev": {"num_layers": 1, "num_single_layers": 1},
    "pixart-sigma": {"num_layers": 2},
}
"""What of each model's configuration is less, so that a forward pass takes seconds. Widths and heads are its own."""
LATENTS = (16, 16)

Rgb = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Cost:
    """Differences of a channel from the exact picture in 1/255, over all pictures; pictures that the judge finds
    right, where it was asked."""

    name: str
    mean: float
    most: float
    right: int | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--only", choices=("pictures", "steps"), help="one of the tables, which is written nowhere")
    asked = parser.parse_args()
    use_threads(None)
    lines = []
    tables = {"pictures": lambda: pictures(asked.prompts), "steps": steps}
    wanted = [asked.only] if asked.only else list(tables)
    for line in chain.from_iterable(chain(tables[name](), [""]) for name in wanted):
        print(line, flush=True)
        lines.append(line)
    if not asked.only:
        text = "\n".join(lines) + "\n"
        before, _, rest = DOCUMENT.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        DOCUMENT.write_text(f"{before}{BEGIN}{text}{end}{after}")


def pictures(prompts: int) -> Iterator[str]:
    """Lines of the first table."""
    asked = held_out_prompts(prompts)
    model = resolve(ModelSettings(), Path())
    works = orders(model, [prompt for prompt, _ in asked])
    exact = drawn(open_runner(model, SETTINGS), works)
    yield (
        f"The shipped model, {prompts} held-out prompts of one thing, {SIDE} x {SIDE}, {STEPS} steps, float32 on a CPU."
        " Differences from `resident` are of a channel, in 1/255."
    )
    yield ""
    yield "| rung | mean difference | largest | right, says the judge |"
    yield "|---|---:|---:|---:|"
    yield f"| `resident` | 0 | 0 | {right(exact, asked)} of {prompts} |"
    for name, runner in on_rungs(model):
        images = drawn(runner, works)
        cost = compared(name, images, exact)
        yield f"| {name} | {cost.mean:.3f} | {cost.most:.0f} | {right(images, asked)} of {prompts} |"
    cost = tiled(open_runner(model, SETTINGS), [scene for _, scene in asked[:LARGE_PICTURES]])
    yield f"| {cost.name} | {cost.mean:.3f} | {cost.most:.0f} | |"


def on_rungs(model: ModelFolder) -> Iterator[tuple[str, Runner]]:
    for rung in (Rung.ATTENTION_SLICING, *PACKED, Rung.OFFLOAD, Rung.SEQUENTIAL_OFFLOAD):
        attention.SCORES = SCORES if MEANS[rung].sliced_attention else 1 << 24
        yield f"`{rung}`", open_runner(model, SETTINGS, rung=rung)
    runner = open_runner(model, SETTINGS, rung=Rung.INT8)
    descend(runner.family, Rung.INT4)
    yield "`int4`, packed once more from `int8`", runner


def orders(model: ModelFolder, prompts: Sequence[str]) -> list[Work]:
    """One image each, with a seed of its own, its text encoded."""
    with tempfile.TemporaryDirectory() as notes:
        registry = register([model], Settings(data_dir=Path(notes)))
    planner, tower = Planner(model, registry.sources(model.name)), TextTower.load(registry.encoders[0], "cpu")
    works = []
    for seed, prompt in enumerate(prompts):
        request = ImageRequest(
            model=model.name,
            prompt=prompt,
            seed=seed,
            width=SIDE,
            height=SIDE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
        )
        plan = planner.plan(request.text)
        values = tower.encode([Row.of(unit, tower.outputs) for unit in plan.units])
        known = {unit.key: pack(value[unit.output]) for unit, value in zip(plan.units, values, strict=True)}
        works.append(Work(str(seed), replace(request, composed=plan.composed), compose(plan, known)))
    return works


def drawn(runner: Runner, works: Sequence[Work]) -> list[Rgb]:
    images = []
    for first in range(0, len(works), TOGETHER):
        part = works[first : first + TOGETHER]
        rows = [runner.rows(work)[0] for work in part]
        for row, work in zip(rows, part, strict=True):
            runner.begin(row, work, None)
        for _ in range(rows[0].steps):
            for error in runner.step(rows).values():
                raise error
        images += [np.asarray(runner.decode(runner.release(row)), dtype=float) for row in rows]
    return images


def right(images: Sequence[Rgb], asked: Sequence[tuple[str, Scene]]) -> int:
    return sum(agrees(read(image.astype(np.uint8)), scene).ok for image, (_, scene) in zip(images, asked, strict=True))


def compared(name: str, images: Sequence[Rgb], exact: Sequence[Rgb]) -> Cost:
    differences = np.abs(np.stack(images) - np.stack(exact))
    return Cost(name, float(differences.mean()), float(differences.max()), None)


def tiled(runner: Runner, scenes: Sequence[Scene]) -> Cost:
    """Drawn scenes of a larger size, encoded whole; decoded whole, and as `vae_tiling` does."""
    vae, images = runner.family.vae, []
    for tile in (LARGE, MEANS[Rung.VAE_TILING].tile):
        for scene in scenes:
            vae.tile = LARGE
            pixels = torch.from_numpy(draw(scene, LARGE)).permute(2, 0, 1).unsqueeze(0) / 127.5 - 1
            latents = vae.encode(pixels).mode()
            vae.tile = tile
            images.append(((vae.decode(latents) / 2 + 0.5).clamp(0, 1) * 255).round().numpy())
    name = f"`vae_tiling`, {len(scenes)} drawn pictures of {LARGE} x {LARGE}, encoded and decoded"
    return compared(name, images[len(scenes) :], images[: len(scenes)])


def steps() -> Iterator[str]:
    """Lines of the second table."""
    yield (
        "One forward pass with packed weights against the same with whole ones, float32 on a CPU, latents of "
        f"{LATENTS[0]} x {LATENTS[1]}: length of the difference over that of the output."
    )
    yield ""
    yield "| model | layers computed | int8 | int4 |"
    yield "|---|---|---:|---:|"
    shipped = open_runner(resolve(ModelSettings(), Path()), SETTINGS).family
    yield f"| the shipped model, its own weights | all | {' | '.join(errors(shipped))} |"
    for name, fewer in FEW.items():
        shape = published()[name]
        family = random_family(replace(shape, denoiser={**shape.denoiser, **fewer}), CPU, torch.float32, Rung.RESIDENT)
        layers = ", ".join(f"`{key}` {value}" for key, value in fewer.items())
        yield f"| {name}, random weights | {layers} | {' | '.join(errors(family))} |"


def errors(family: Family) -> Iterator[str]:
    """Of int8, and of int4 after it: the second packing of what was packed adds next to nothing."""
    exact = output(family)
    for rung in PACKED:
        descend(family, rung)
        yield f"{float((output(family) - exact).norm() / exact.norm()):.1%}".replace("%", " %")


@torch.inference_mode()
def output(family: Family) -> torch.Tensor:
    return family.predict(synthetic_lanes(family, LATENTS, 1))


if __name__ == "__main__":
    main()
