"""The text encoder: a small CLIPTextModel (Radford et al. 2021), first taught to read captions.

Reading means to name the scene's attributes from the state at the end token. The head that names them is thrown away.
The U-Net then starts from embeddings that already tell the scenes apart, which trains faster than both from scratch.
"""

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from serve.shapes.captions import Phrase, caption
from serve.shapes.draw import COLOR_NAMES, PLACE_NAMES, SHAPES, SIZES, Scene, sample_scene
from serve.shapes.training import parallel
from serve.shapes.training.config import Recipe
from serve.shapes.training.tokenizer import ROW_LENGTH, load_tokenizer

STAGE = 4
LEARNING_RATE = 1e-3
RELATIONS = (None, "left of", "above")
CLASSES = [
    len(COLOR_NAMES),
    len(COLOR_NAMES),
    len(SHAPES),
    len(PLACE_NAMES),
    len(SIZES),
    len(RELATIONS),
    len(COLOR_NAMES),
    len(SHAPES),
]
"""Answers of the reading head: background, colour, shape, place, size, relation, second colour, second shape."""
UNSAID = -1


def make_text_encoder(recipe: Recipe, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A fresh encoder for the tokenizer's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=3 * recipe.text_width,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=4,
            projection_dim=recipe.text_width,
            max_position_embeddings=ROW_LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attention_dropout=0.0,
        )
    )


class PhraseEmbedder:
    """Owns: the tokenizer and the encoder of a training run; turns phrases into the U-Net's conditioning."""

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder

    def ids(self, texts: list[str]) -> Tensor:
        """Rows of 77 token ids."""
        rows = self.tokenizer(
            texts, padding="max_length", max_length=ROW_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        return torch.as_tensor(rows)

    def __call__(self, phrases: list[Phrase]) -> Tensor:
        """(n, 77, width): each phrase's text, blended and weighted as it says."""
        blended = [i for i, phrase in enumerate(phrases) if phrase.mix > 0]
        texts = [p.text for p in phrases] + [phrases[i].other for i in blended] + [""]
        ids = self.ids(texts)
        states: Tensor = self.encoder(ids).last_hidden_state
        rows, others, empty = torch.split(states, [len(phrases), len(blended), 1])
        if blended:
            mix = torch.tensor([phrases[i].mix for i in blended]).view(-1, 1, 1)
            index = torch.tensor(blended)
            rows = rows.index_copy(0, index, torch.lerp(rows[index], others, mix))
        weights = self._word_weights(phrases, ids)
        return rows if weights is None else empty + weights * (rows - empty)

    def _word_weights(self, phrases: list[Phrase], ids: Tensor) -> Tensor | None:
        """(n, 77, 1) factors for the weighted words' tokens; None when every factor is 1."""
        weighted = [i for i, phrase in enumerate(phrases) if phrase.word]
        if not weighted:
            return None
        factors = torch.ones(len(phrases), ROW_LENGTH, 1)
        for i in weighted:
            word = self.tokenizer(phrases[i].word, add_special_tokens=False).input_ids
            row = ids[i].tolist()
            start = next(s for s in range(ROW_LENGTH) if row[s : s + len(word)] == word)
            factors[i, start : start + len(word)] = phrases[i].weight
        return factors


def train_text(recipe: Recipe, tokenizer_folder: Path, out: Path) -> None:
    """Teach the encoder to read, save it to ``out``; runs in every worker of a group."""
    torch.manual_seed(recipe.seed + STAGE)
    tokenizer = load_tokenizer(tokenizer_folder)
    encoder = make_text_encoder(recipe, tokenizer)
    head = nn.Linear(recipe.text_width, sum(CLASSES))
    params = [*encoder.parameters(), *head.parameters()]
    adam = torch.optim.AdamW(params, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)
    for step in range(recipe.text_steps):
        for group in adam.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * (1 - 0.95 * step / recipe.text_steps)
        rng = np.random.default_rng([recipe.seed, STAGE, step, parallel.rank()])
        words = random.Random(int(rng.integers(2**62)))
        scenes = [sample_scene(rng) for _ in range(recipe.text_batch)]
        texts = [caption(scene, words, complete=words.random() < 0.65) for scene in scenes]
        ids = torch.as_tensor(tokenizer(texts, padding="longest", return_tensors="pt").input_ids)
        answers = torch.split(head(_state_at_end(encoder, ids, tokenizer)), CLASSES, 1)
        truth = torch.tensor([_attributes(scene) for scene in scenes])
        losses = [nn.functional.cross_entropy(a, truth[:, i], ignore_index=UNSAID) for i, a in enumerate(answers)]
        loss = torch.stack(losses).nansum()
        loss.backward()
        parallel.average_gradients(params)
        adam.step()
        adam.zero_grad()
        if step % 200 == 0 or step == recipe.text_steps - 1:
            right = [_accuracy(a, truth[:, i]) for i, a in enumerate(answers)]
            parallel.say(f"text {step}/{recipe.text_steps} loss {loss.item():.3f} accuracy {right}")
    if parallel.rank() == 0:
        encoder.save_pretrained(out)


def _state_at_end(encoder: CLIPTextModel, ids: Tensor, tokenizer: CLIPTokenizer) -> Tensor:
    states: Tensor = encoder(ids).last_hidden_state
    return states[torch.arange(len(ids)), (ids == tokenizer.eos_token_id).int().argmax(1)]


def _attributes(scene: Scene) -> list[int]:
    """The scene's indices into each of ``CLASSES``; UNSAID where an attribute does not apply."""
    first, *rest = scene.things
    answers = [COLOR_NAMES.index(scene.background), COLOR_NAMES.index(first.color), SHAPES.index(first.shape)]
    if rest:
        answers += [UNSAID, UNSAID, RELATIONS.index(scene.relation)]
        return [*answers, COLOR_NAMES.index(rest[0].color), SHAPES.index(rest[0].shape)]
    return [*answers, PLACE_NAMES.index(first.place), list(SIZES).index(first.size), 0, UNSAID, UNSAID]


def _accuracy(answer: Tensor, truth: Tensor) -> float:
    asked = truth != UNSAID
    return round(float((answer.argmax(1) == truth)[asked].float().mean()), 2)
