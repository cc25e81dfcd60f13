"""Measures a model through the stock pipeline: ``python -m serve.shapes.evaluate [--model DIR] [--sheet PNG]``.

Prints a table: the judge's verdicts on held-out prompts, and how well prompt arithmetic (negative prompt, weight,
blend, schedule) does what it says. The arithmetic is spelled out here in a few lines of torch, independent of the
server's.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging
from numpy.typing import NDArray
from torch import Tensor

from serve.shapes import WEIGHTS
from serve.shapes.captions import between, held_out_prompts
from serve.shapes.draw import COLOR_NAMES, PALETTE, SHAPES, Scene, is_held_out
from serve.shapes.judge import Reading, Verdict, agrees, read, to_lab
from serve.shapes.sheet import contact_sheet

STEPS = 20
GUIDANCE = 3.0
BATCH = 20
Images = NDArray[np.float32]


@dataclass(frozen=True)
class Outcome:
    """One prompt, its picture and the judge's verdict."""

    prompt: str
    scene: Scene
    image: Images
    verdict: Verdict


class Model:
    """Owns: a loaded stock pipeline; generates with fixed seeds, in batches."""

    def __init__(self, folder: Path, steps: int = STEPS, guidance: float = GUIDANCE) -> None:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
        self.pipeline = pipeline.to(torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        self.steps = steps
        self.guidance = guidance

    def generate(self, prompts: Sequence[str], first_seed: int = 0, **options: Any) -> Images:
        """Pictures (n, 128, 128, 3) in 0..1; prompt i gets seed ``first_seed + i``."""
        return self._in_batches(
            len(prompts), first_seed, lambda part: {"prompt": list(prompts[part]), **_slice(options, part)}
        )

    def generate_from(self, embeddings: Tensor, first_seed: int = 0) -> Images:
        """The same from embeddings (n, 77, width), against the empty prompt."""
        empty = self.embed([""])

        def inputs(part: slice) -> dict[str, Any]:
            rows = embeddings[part]
            return {"prompt_embeds": rows, "negative_prompt_embeds": empty.expand_as(rows)}

        return self._in_batches(len(embeddings), first_seed, inputs)

    def generate_scheduled(self, first: Sequence[str], then: Sequence[str], switch: int) -> Images:
        """Pictures whose prompt changes from ``first`` to ``then`` after ``switch`` steps."""
        later, empty = self.embed(then), self.embed([""])

        def inputs(part: slice) -> dict[str, Any]:
            after = torch.cat([empty.expand_as(later[part]), later[part]])

            def change(_pipe: object, step: int, _timestep: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
                return {"prompt_embeds": after if step + 1 == switch else tensors["prompt_embeds"]}

            return {"prompt": list(first[part]), "callback_on_step_end": change} | {
                "callback_on_step_end_tensor_inputs": ["prompt_embeds"]
            }

        return self._in_batches(len(first), 0, inputs)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """(n, 77, width)."""
        ids = self.pipeline.tokenizer(
            list(texts), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        states: Tensor = self.pipeline.text_encoder(ids).last_hidden_state
        return states

    def _in_batches(self, count: int, first_seed: int, inputs: Callable[[slice], dict[str, Any]]) -> Images:
        images = []
        for start in range(0, count, BATCH):
            stop = min(start + BATCH, count)
            images.append(
                self.pipeline(
                    **inputs(slice(start, stop)),
                    num_inference_steps=self.steps,
                    guidance_scale=self.guidance,
                    generator=[torch.Generator().manual_seed(first_seed + i) for i in range(start, stop)],
                    output_type="np",
                ).images
            )
        return np.concatenate(images)


def judge_prompts(model: Model, count: int, *, two: bool) -> list[Outcome]:
    """Generate and judge held-out prompts."""
    pairs = held_out_prompts(count, two=two)
    images = model.generate([prompt for prompt, _ in pairs], first_seed=7000 if two else 0)
    return [
        Outcome(prompt, scene, image, agrees(read(image), scene))
        for (prompt, scene), image in zip(pairs, images, strict=True)
    ]


def table(outcomes: Sequence[Outcome]) -> str:
    """One line of percentages."""
    columns = {
        "background": [o.verdict.background for o in outcomes],
        "colours": [o.verdict.colors for o in outcomes],
        "shapes": [o.verdict.shapes for o in outcomes],
        "places": [o.verdict.places for o in outcomes],
        "count": [o.verdict.count for o in outcomes],
        "background+colour+shape": [o.verdict.background and o.verdict.colors and o.verdict.shapes for o in outcomes],
        "all": [o.verdict.ok for o in outcomes],
    }
    cells = [f"{name} {100 * float(np.mean(values)):.1f} %" for name, values in columns.items()]
    return ", ".join([*cells, f"mean IoU {np.mean([o.verdict.iou for o in outcomes]):.3f}"])


def negative_rate(model: Model, per_shape: int = 6) -> float:
    """How often a colour stays when it becomes the negative prompt.

    The prompt names no colour; the same seeds first run without a negative prompt, and the judge names what they gave.
    """
    prompts = [f"a large {shape} on a white background" for shape in SHAPES for _ in range(per_shape)]
    before = [_first_color(read(image)) for image in model.generate(prompts)]
    after = [_first_color(read(image)) for image in model.generate(prompts, negative_prompt=before)]
    return float(np.mean([old == new for old, new in zip(before, after, strict=True) if old]))


def weight_rates(model: Model, count: int = 40) -> tuple[float, float]:
    """Of "a red blue circle": the shares where 1.6 on the first word, or on the second, moves the colour towards it."""
    scenes = _two_colors(count)
    texts = [f"a large {a} {b} {shape} on a {ground} background" for a, b, shape, ground in scenes]
    plain = _first_rgb(model.generate_from(model.embed(texts)))
    shares = []
    for which in (0, 1):
        weighted = torch.cat([_weighted(model, text, s[which], 1.6) for text, s in zip(texts, scenes, strict=True)])
        moved = _first_rgb(model.generate_from(weighted))
        goals = [PALETTE[COLOR_NAMES.index(s[which])] for s in scenes]
        closer = [_distance(m, g) < _distance(p, g) for m, p, g in zip(moved, plain, goals, strict=True)]
        shares.append(float(np.mean(closer)))
    return shares[0], shares[1]


def blend_rates(model: Model, count: int = 40) -> tuple[float, float]:
    """Of half-and-half blends of two colours: the shares that lie between them, and nearer the middle than to an end.

    Between: the projection on the line from one palette colour to the other, in sRGB, falls within 0.1 .. 0.9 of it.
    Nearer to the middle: by CIELAB distance.
    """
    scenes = _two_colors(count)
    first, second = (model.embed([f"a large {s[i]} {s[2]} on a {s[3]} background" for s in scenes]) for i in (0, 1))
    seen = _first_rgb(model.generate_from((first + second) / 2))
    between_them, in_the_middle = [], []
    for rgb, (a, b, _, _) in zip(seen, scenes, strict=True):
        one, middle, other = (np.asarray(between(a, b, share)) for share in (0.0, 0.5, 1.0))
        along = float((rgb - one) @ (other - one) / ((other - one) @ (other - one)))
        between_them.append(0.1 < along < 0.9)
        in_the_middle.append(_distance(rgb, middle) < min(_distance(rgb, one), _distance(rgb, other)))
    return float(np.mean(between_them)), float(np.mean(in_the_middle))


def schedule_rate(model: Model, count: int = 40, switch: int = 2) -> float:
    """Share of pictures that show the second shape when the prompt changes to it after ``switch`` steps."""
    shapes = [SHAPES[1 + i % (len(SHAPES) - 1)] for i in range(count)]
    first = [f"a large {_allowed(shape)} circle on a white background" for shape in shapes]
    then = [f"a large {_allowed(shape)} {shape} on a white background" for shape in shapes]
    readings = [read(image) for image in model.generate_scheduled(first, then, switch)]
    return float(np.mean([bool(r.things) and r.things[0].shape == s for r, s in zip(readings, shapes, strict=True)]))


def seconds_per_image(model: Model) -> float:
    """One picture alone on one core, mean of five."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model.generate(["a red circle"])
    began = time.perf_counter()
    for seed in range(5):
        model.generate(["a red circle on a blue background"], first_seed=seed)
    torch.set_num_threads(threads)
    return (time.perf_counter() - began) / 5


def _allowed(shape: str) -> str:
    return next(color for color in COLOR_NAMES if not is_held_out(color, shape, "white"))


def _two_colors(count: int) -> list[tuple[str, str, str, str]]:
    """(first colour, second colour, shape, background), all different colours."""
    rng = np.random.default_rng(11)
    scenes = []
    for _ in range(count):
        ground, first, second = (str(name) for name in rng.choice(COLOR_NAMES, 3, replace=False))
        scenes.append((first, second, str(rng.choice(SHAPES)), ground))
    return scenes


def _weighted(model: Model, text: str, word: str, weight: float) -> Tensor:
    """Embedding of ``text`` with the tokens of ``word`` moved away from the empty prompt's (Compel's rule)."""
    tokenizer = model.pipeline.tokenizer
    row = tokenizer(text).input_ids
    tokens = tokenizer(word, add_special_tokens=False).input_ids
    start = next(i for i in range(len(row)) if row[i : i + len(tokens)] == tokens)
    embedding, empty = model.embed([text]), model.embed([""])
    here = slice(start, start + len(tokens))
    embedding[:, here] = empty[:, here] + weight * (embedding[:, here] - empty[:, here])
    return embedding


def _first_color(reading: Reading) -> str:
    return reading.things[0].color if reading.things else ""


def _first_rgb(images: Images) -> list[NDArray[np.floating[Any]]]:
    readings = [read(image) for image in images]
    return [np.asarray(r.things[0].rgb if r.things else r.background_rgb) for r in readings]


def _distance(first: NDArray[np.floating[Any]], second: NDArray[np.floating[Any]]) -> float:
    return float(np.linalg.norm(to_lab(first) - to_lab(second)))


def _slice(options: dict[str, Any], part: slice) -> dict[str, Any]:
    return {name: value[part] if isinstance(value, list) else value for name, value in options.items()}


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m serve.shapes.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--one", type=int, default=200, help="one-object prompts")
    parser.add_argument("--two", type=int, default=100, help="two-object prompts")
    parser.add_argument("--skip-arithmetic", action="store_true")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet here")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = Model(options.model, options.steps, options.guidance)
    one = judge_prompts(model, options.one, two=False)
    print(f"one object ({len(one)}): {table(one)}", flush=True)
    two = judge_prompts(model, options.two, two=True)
    print(f"two objects ({len(two)}): {table(two)}", flush=True)
    for outcome in (o for o in [*one, *two] if not o.verdict.ok):
        print(f"  missed: {outcome.prompt!r} {outcome.verdict}")
    if not options.skip_arithmetic:
        print(f"negative prompt: the colour stays in {100 * negative_rate(model):.0f} % of the pictures")
        first, second = weight_rates(model)
        print(f"weight 1.6: moves the colour on the first word {100 * first:.0f} %, on the second {100 * second:.0f} %")
        between_them, middle = blend_rates(model)
        print(f"blend of two colours: between them {100 * between_them:.0f} %, near the middle {100 * middle:.0f} %")
        print(
            f"schedule (changed after 2 of {model.steps} steps) switches the shape: {100 * schedule_rate(model):.0f} %"
        )
        print(f"one picture on one core: {seconds_per_image(model):.2f} s")
    if options.sheet:
        chosen = [(o.prompt, o.image) for o in [*one[:32], *two[:16]]]
        contact_sheet(chosen, options.sheet)


if __name__ == "__main__":
    main()
