"""Measures what each rule for weights does to an embedding, and prints the table that docs/prompts.md has.

    python scripts/weighting_table.py [--model FOLDER] [--words red] [prompt with the words in it]

Every text encoder of the model that gives one vector per token has its own table. `size` is the length of the vectors
beside the unweighted ones', `cosine` the angle between the two: of the weighted words, of all other tokens (begin, end
and padding too), and of the whole row, for which the mean is told too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from serve.domain.text import EncodeUnit, Weighting
from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import Encoder, register
from serve.encoders.weighting import apply
from serve.models import SHIPPED, check_folder
from serve.prompts.tokenizers import PromptTokenizer
from serve.prompts.wanted import WeightedRow, wanted
from serve.settings.tree import Settings

WEIGHTS = (0.0, 0.5, 0.9, 1.1, 1.5, 2.0)
T5_ROW = 64
HEAD = "| rule | weight | words: size | cosine | others: size | cosine | row: size | mean |\n" + "|---|" + "---:|" * 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="a red circle on a blue background")
    parser.add_argument("--words", default="red")
    parser.add_argument("--model", type=Path, default=SHIPPED)
    asked = parser.parse_args()
    model = check_folder(asked.model, "model", text_only=True)
    with tempfile.TemporaryDirectory() as notes:
        encoders = register([model], Settings(data_dir=Path(notes))).encoders
    for encoder in encoders:
        if any(output == "hidden" or output.startswith("skip:") for output in encoder.outputs):
            print(f"\n{encoder.name}, `{asked.prompt}`, weight on `{asked.words}`:\n\n{HEAD}")
            for line in table(encoder, asked.prompt, asked.words):
                print(line)


def table(encoder: Encoder, prompt: str, words: str) -> list[str]:
    """Its rows. Raises SystemExit where the words are not in the prompt."""
    before, found, after = prompt.partition(words)
    if not found:
        raise SystemExit(f"{words!r} is not in the prompt")
    tokenizer, tower = PromptTokenizer(encoder.part), TextTower.load(encoder, "cpu")
    output = next(each for each in encoder.outputs if each == "hidden" or each.startswith("skip:"))
    length = encoder.part.row_tokens or T5_ROW
    parts = [tokenizer.tokenize(text).ids for text in (before, words, after)]
    first = len(tokenizer.before) + len(parts[0])
    places = range(first, first + len(parts[1]))

    def unit(ids: tuple[int, ...]) -> EncodeUnit:
        return EncodeUnit(encoder.fingerprint, tokenizer.row(ids, length), output)

    text, empty = unit(tuple(id for part in parts for id in part)), unit(())
    lines = []
    for rule in Weighting:
        for weight in WEIGHTS:
            weights = tuple(weight if place in places else 1.0 for place in range(length))
            plan = wanted(rule, [WeightedRow(text, weights)], empty)
            values = tower.encode([Row.of(each, tower.outputs) for each in plan.units])
            embedded = {each: value[output] for each, value in zip(plan.units, values, strict=True)}
            (got,) = apply(plan, embedded.__getitem__)
            figures = " | ".join(f"{figure:.3f}" for figure in compare(got, embedded[text].float(), list(places)))
            lines.append(f"| {rule} | {weight:g} | {figures} |")
    return lines


def compare(got: torch.Tensor, plain: torch.Tensor, places: list[int]) -> tuple[float, ...]:
    rest = [place for place in range(len(plain)) if place not in places]
    sizes, cosines = got.norm(dim=1) / plain.norm(dim=1), torch.cosine_similarity(got, plain, dim=1)
    means = (float(of[part].mean()) for part in (places, rest) for of in (sizes, cosines))
    return (*means, float(got.norm() / plain.norm()), float(got.mean() / plain.mean()))


if __name__ == "__main__":
    main()
