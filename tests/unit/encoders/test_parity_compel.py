"""Compel's prompts from text to embedding: our parser, planner, units and assembly against Compel alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compel import Compel, ReturnedEmbeddingsType
from hypothesis import given, settings
from hypothesis import strategies as st
from support.text_models import sd_folder, sdxl_folder
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from serve.domain.text import Syntax, TextRequest, Weighting
from serve.encoders.codec import pack
from serve.encoders.compose import compose
from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import register
from serve.models import ModelFolder, check_folder
from serve.prompts.plan import Planner
from serve.settings.tree import Settings

FOLDERS: Mapping[str, Callable[[Path], Path]] = {"sd": sd_folder, "sdxl": sdxl_folder}
RETURNED = {
    "sd": ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED,
    "sdxl": ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
}


@dataclass(frozen=True, slots=True)
class Model:
    planner: Planner
    towers: Mapping[str, TextTower]
    compel: tuple[Any, ...]
    """One for each encoder: Compel's way to take several is on its way out."""

    def context(self, prompt: str) -> torch.Tensor:
        """What the prompt's first step reads, (tokens, width)."""
        request = TextRequest(
            model="m", prompt=prompt, width=64, height=64, syntax=Syntax.COMPEL, weighting=Weighting.COMPEL
        )
        plan = self.planner.plan(request)
        embeddings = {}
        for encoder, tower in self.towers.items():
            units = [unit for unit in plan.units if unit.encoder == encoder]
            values = tower.encode([Row.of(unit, tower.outputs) for unit in units])
            embeddings |= {unit.key: pack(value[unit.output]) for unit, value in zip(units, values, strict=True)}
        schedule = compose(plan, embeddings)
        (phase,) = schedule.phases
        ((_, mix),) = phase.positive
        return torch.stack([share * schedule.texts[index].context for share, index in mix]).sum(0)

    @torch.inference_mode()
    def compels(self, prompt: str) -> torch.Tensor:
        return torch.cat([compel(prompt)[0] for compel in self.compel], dim=-1)


def compels(model: ModelFolder) -> tuple[Any, ...]:
    made = []
    for part in model.text:
        kind = CLIPTextModel if part.projection is None else CLIPTextModelWithProjection
        encoder = kind.from_pretrained(part.weights, attn_implementation="sdpa").eval()
        tokenizer = CLIPTokenizer.from_pretrained(part.tokenizer)
        made.append(Compel(tokenizer, encoder, returned_embeddings_type=RETURNED[model.family]))
    return tuple(made)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Model]:
    made = {}
    for name, make in FOLDERS.items():
        root = tmp_path_factory.mktemp(name)
        model = check_folder(make(root / name), name, text_only=True)
        registry = register([model], Settings(data_dir=root / "data"))
        towers = {encoder.fingerprint: TextTower.load(encoder, "cpu") for encoder in registry.encoders}
        made[name] = Model(Planner(model, registry.sources(name)), towers, compels(model))
    return made


word = st.sampled_from(["a", "red", "circle", "blue", "tiny", "star", "background", "masterpiece", "ugly"])
words = st.lists(word, min_size=1, max_size=3).map(" ".join)
number = st.sampled_from(["1.3", "0.6", "0.9", "1.0", "2.0", "0.0"])
piece = (
    word
    | st.tuples(word, st.sampled_from(["+", "++", "-", "--"])).map("".join)
    | st.tuples(words, st.sampled_from(["+", "++++", "-", "---"])).map(lambda each: f"({each[0]}){each[1]}")
    | st.tuples(words, number).map(lambda each: f"({each[0]}){each[1]}")
    | st.tuples(word, words, number, word, number).map(lambda each: "({} ({}){} {}){}".format(*each))
    | st.just("circle,")
)
text = st.lists(piece, min_size=1, max_size=6).map(" ".join)
share = st.sampled_from(["1", "0.5", "0.7", "2"])
blend = st.tuples(text, text, share, share).map(lambda each: '("{}", "{}").blend({}, {})'.format(*each))
conjunction = st.tuples(text, text, share, share).map(lambda each: '("{}", "{}").and({}, {})'.format(*each))


@settings(max_examples=20, deadline=None)
@given(prompt=text | blend | conjunction)
@pytest.mark.parametrize("name", FOLDERS)
def test_any_prompt_gives_compels_embedding(models: Mapping[str, Model], name: str, prompt: str) -> None:
    ours, theirs = models[name].context(prompt), models[name].compels(prompt)
    assert ours.shape == theirs.shape
    scale = max(1.0, float(theirs.abs().max()))
    assert torch.allclose(ours, theirs, atol=1e-5 * scale, rtol=0), (ours - theirs).abs().max()


PROMPTS = [
    "",
    "a red circle",
    "a red++ circle",
    "a (red circle)0.5 on a (blue background)1.4",
    "(a (red)1.5 circle)--, (tiny star)0.0",
    '("a red circle", "a blue star").blend(0.7, 0.3)',
    '("a red circle", "a blue star").blend(1, 0.5, no_normalize)',
    '("a red++ circle", "a (blue)0.4 star").and(1, 0.5)',
]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", FOLDERS)
def test_what_compels_users_write_gives_compels_embedding(models: Mapping[str, Model], name: str, prompt: str) -> None:
    ours, theirs = models[name].context(prompt), models[name].compels(prompt)
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=0), (ours - theirs).abs().max()
