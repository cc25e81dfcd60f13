"""Encoders of a shape with random weights, on disk as the product loads them. The seed fixes every number."""

from __future__ import annotations

import hashlib
import json
import shutil
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.utils import logging as transformers_logging

from serve.bench.shapes import EncoderShape
from serve.encoders.registry import Encoder
from serve.models import SHIPPED, TextPart
from serve.settings.pools import EncoderSettings

_ROLE = "text_encoder"
_PROJECTION = "00000000"
_SENTINELS = 100
"""T5's `<extra_id_N>`, the last of its vocabulary."""


@contextmanager
def random_encoder(shape: EncoderShape, seed: int, folder: Path) -> Iterator[TextPart]:
    """The encoder in `folder`, for as long as it is needed: bigG takes 2.8 GB of disk."""
    part = write_encoder(shape, seed, folder)
    try:
        yield part
    finally:
        shutil.rmtree(folder)


def write_encoder(shape: EncoderShape, seed: int, folder: Path, role: str = _ROLE) -> TextPart:
    """`folder/ROLE`: configuration and float32 weights, as transformers initialises them. No tokenizer."""
    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _model(shape).save_pretrained(folder / role)
    return TextPart(
        role=role,
        kind=shape.kind,
        name=shape.name,
        weights=folder / role,
        tokenizer=folder / role.replace("text_encoder", "tokenizer"),
        width=shape.width,
        layers=shape.layers,
        vocab_size=shape.vocab_size,
        projection=shape.projection,
        row_tokens=None if shape.kind == "t5" else shape.row_tokens,
    )


def encoder_of(shape: EncoderShape, part: TextPart, settings: EncoderSettings) -> Encoder:
    """The encoder as a registry would have it, with the outputs that the models which are named in `SHAPES` read."""
    recipe = repr((shape, settings.dtype, settings.quantization)).encode()
    projections = () if shape.projection is None else ((_PROJECTION, part),)
    return Encoder(
        name=shape.name,
        fingerprint=hashlib.blake2b(recipe, digest_size=16).hexdigest(),
        part=part,
        projections=projections,
        outputs=("hidden",) if not projections else ("skip:1", f"projected:{_PROJECTION}"),
        settings=settings,
        models=("bench",),
    )


def write_model(shapes: Sequence[EncoderShape], seed: int, folder: Path) -> None:
    """The text side of a Stable Diffusion 1.x folder (one CLIP) or of a FLUX folder (CLIP and T5): what `tandem up`
    needs to serve text alone."""
    index: dict[str, object] = {"_class_name": "StableDiffusionPipeline" if len(shapes) == 1 else "FluxPipeline"}
    for role, shape in zip((_ROLE, f"{_ROLE}_2"), shapes, strict=False):
        part = write_encoder(shape, seed, folder, role)
        t5 = shape.kind == "t5"
        (_write_t5_tokenizer if t5 else _write_tokenizer)(shape, part.tokenizer)
        index[role] = ["transformers", "T5EncoderModel" if t5 else "CLIPTextModel"]
        index[part.tokenizer.name] = ["transformers", "T5TokenizerFast" if t5 else "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def _model(shape: EncoderShape) -> PreTrainedModel:
    if shape.kind == "t5":
        return T5EncoderModel(T5Config(**shape.config))
    config = CLIPTextConfig(**shape.config)
    return CLIPTextModel(config) if shape.projection is None else CLIPTextModelWithProjection(config)


def _write_tokenizer(shape: EncoderShape, folder: Path) -> None:
    """The shipped model's tokenizer with its vocabulary filled up to the encoder's by tokens that no text has."""
    shipped = CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer", local_files_only=True)
    special = (shipped.bos_token, shipped.eos_token)
    known = _shipped_words()
    tokens = [token for token in known if token not in special]
    tokens += [f"\u25a1{number}" for number in range(shape.vocab_size - 2 - len(tokens))] + [*special]
    lines = (SHIPPED / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [(left, right) for left, right in (line.split() for line in lines[1:])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=shape.row_tokens).save_pretrained(folder)


def _write_t5_tokenizer(shape: EncoderShape, folder: Path) -> None:
    """A Unigram tokenizer laid out as T5's: the shipped vocabulary's words, letters and marks, filled up to the
    encoder's vocabulary by tokens that no text has, then the sentinels."""
    words = [word.removesuffix("</w>") for word in _shipped_words() if word.endswith("</w>")]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    pieces += [(letter, -9.0) for letter in string.ascii_lowercase + string.digits + string.punctuation]
    pieces += [(f"\u2581{word}", -6.0) for word in words if word.isascii() and word.isalpha() and len(word) > 1]
    room = shape.vocab_size - _SENTINELS
    pieces = pieces[:room] + [(f"\u25a1{number}", -20.0) for number in range(room - len(pieces))]
    pieces += [(f"<extra_id_{number}>", 0.0) for number in reversed(range(_SENTINELS))]
    T5Tokenizer(vocab=pieces, extra_ids=_SENTINELS, model_max_length=shape.row_tokens).save_pretrained(folder)


def _shipped_words() -> dict[str, int]:
    """Token -> id of the shipped model's tokenizer."""
    words: dict[str, int] = json.loads((SHIPPED / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    return words
