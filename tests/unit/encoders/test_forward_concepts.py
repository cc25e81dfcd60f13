"""Rows with learned vectors in the place of tokens, against transformers' own models with those words added."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.towers import all_outputs, make, random_rows
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel, UMT5EncoderModel

from serve.domain.text import FIRST_CONCEPT_ID
from serve.encoders.forward import Row, TextTower
from serve.encoders.reads import Read
from serve.encoders.registry import Encoder
from serve.encoders.weights import load_trunk
from serve.errors import BackendUnavailable

KINDS = ("clip", "clip-projected", "openclip", "t5", "umt5")


class Table:
    """Vectors in memory, counted when they are asked for."""

    def __init__(self, **concepts: torch.Tensor) -> None:
        self.concepts = concepts
        self.asked: list[tuple[str, ...]] = []

    def vectors(self, digests: Sequence[str]) -> torch.Tensor:
        self.asked.append(tuple(digests))
        if not self.concepts.keys() >= set(digests):
            raise BackendUnavailable("no file has it", None, 1.0)
        return torch.cat([self.concepts[digest] for digest in digests])


def table(width: int) -> Table:
    generator = torch.Generator().manual_seed(7)
    return Table(cat=torch.randn(2, width, generator=generator), style=torch.randn(1, width, generator=generator))


def put(row: Row, at: int, *numbers: int) -> tuple[int, ...]:
    ids = list(row.token_ids)
    ids[at : at + len(numbers)] = [FIRST_CONCEPT_ID + number for number in numbers]
    return tuple(ids)


def rows_of(encoder: Encoder) -> list[Row]:
    """A plain row; rows that read one concept, the other, and both: each counts its own from 0 on."""
    plain, cat, style, both = random_rows(encoder, 4)
    return [
        plain,
        Row(put(cat, 2, 0, 1), None, ("cat",)),
        Row(put(style, 1, 0), None, ("style",)),
        Row(put(replace(both, token_ids=put(both, 1, 0)), 3, 1, 2), None, ("style", "cat")),
    ]


def loaded(encoder: Encoder, concepts: Table, outputs: tuple[str, ...] | None = None) -> TextTower:
    trunk = load_trunk(encoder.part, torch.float32, dict(encoder.projections))
    return TextTower(replace(encoder, outputs=outputs or encoder.outputs), trunk, torch.device("cpu"), concepts)


def taught(encoder: Encoder, rows: Sequence[Row], concepts: Table) -> dict[str, torch.Tensor]:
    """The stock model with a vocabulary that has the vectors at its end."""
    part = encoder.part
    clip = CLIPTextModel if part.projection is None else CLIPTextModelWithProjection
    kind = {"clip": clip, "t5": T5EncoderModel, "umt5": UMT5EncoderModel}[part.kind]
    model = kind.from_pretrained(part.weights).eval()
    old = model.get_input_embeddings().weight.data
    first = {"cat": len(old), "style": len(old) + 2}
    words = torch.cat([old, concepts.concepts["cat"], concepts.concepts["style"]])
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(words))
    ids = []
    for row in rows:
        places = [first[each] + at for each in row.concepts for at in range(len(concepts.concepts[each]))]
        ids.append([places[id - FIRST_CONCEPT_ID] if id >= FIRST_CONCEPT_ID else id for id in row.token_ids])
    with torch.inference_mode():
        found = model(torch.tensor(ids), output_hidden_states=True)
    named = {"hidden": found.last_hidden_state}
    named |= {f"skip:{n}": found.hidden_states[-(n + 1)] for n in range(1, part.layers + 1)}
    if part.projection is not None:
        named |= {f"projected:{name}": found.text_embeds for name, _ in encoder.projections}
    elif part.kind == "clip":
        named["pooled"] = found.pooler_output
    return named


@pytest.mark.parametrize("kind", KINDS)
def test_every_output_is_that_of_a_model_with_those_words(encoders: Mapping[str, Encoder], kind: str) -> None:
    encoder = encoders[kind]
    concepts, rows = table(encoder.part.width), rows_of(encoder)
    expected = taught(encoder, rows, concepts)
    found = loaded(encoder, concepts, all_outputs(encoder)).encode(rows)
    for name, tensors in expected.items():
        for place, tensor in enumerate(tensors):
            assert torch.allclose(found[place][name], tensor, atol=1e-5, rtol=0), (name, place)


def test_concepts_can_be_hidden_like_words(encoders: Mapping[str, Encoder]) -> None:
    encoder = encoders["clip"]
    tower = loaded(encoder, table(encoder.part.width), ("hidden",))
    _, cat, style, _ = rows_of(encoder)
    swapped = Row(cat.token_ids[:2] + style.token_ids[1:2] + cat.token_ids[3:], None, ("cat",), (2, 3))
    rest = [place for place in range(77) if place not in (2, 3)]
    one, other = (found["hidden"] for found in tower.encode([replace(cat, hidden=(2, 3)), swapped]))
    assert torch.allclose(one[rest], other[rest], atol=1e-6)
    assert not torch.allclose(one[rest], tower.encode([cat])[0]["hidden"][rest], atol=1e-3)


@pytest.mark.parametrize("end", [2, 5])
def test_a_concept_is_not_the_end_of_the_text(encoders: Mapping[str, Encoder], tmp_path: Path, end: int) -> None:
    """Where old configurations have the largest id end the text, a concept's is larger than any."""
    shutil.copytree(encoders["clip"].part.weights, tmp_path / "text_encoder")
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": end}))
    encoder = replace(encoders["clip"], part=replace(encoders["clip"].part, weights=tmp_path / "text_encoder"))
    tower = loaded(encoder, table(encoder.part.width), ("hidden", "pooled"))
    (found,) = tower.encode([Row((1, FIRST_CONCEPT_ID, FIRST_CONCEPT_ID + 1, 5, 9, *(7,) * 72), None, ("cat",))])
    assert torch.equal(found["pooled"], found["hidden"][{2: 4, 5: 3}[end]])


def test_equal_ids_of_other_concepts_are_other_rows(encoders: Mapping[str, Encoder]) -> None:
    encoder = encoders["clip"]
    tower = loaded(encoder, table(encoder.part.width))
    (row,) = random_rows(encoder, 1)
    ids = put(row, 2, 0)
    cat, style, again = tower.encode([Row(ids, None, ("cat",)), Row(ids, None, ("style",)), Row(ids, None, ("cat",))])
    assert (tower.forwards, tower.rows) == (1, 2)
    assert torch.equal(cat["skip:1"], again["skip:1"])
    assert not torch.allclose(cat["skip:1"], style["skip:1"], atol=1e-3)


def test_rows_without_concepts_ask_for_no_vectors(encoders: Mapping[str, Encoder]) -> None:
    concepts = table(encoders["clip"].part.width)
    tower = loaded(encoders["clip"], concepts)
    tower.encode(random_rows(encoders["clip"], 2))
    assert concepts.asked == []
    tower.encode(rows_of(encoders["clip"]))
    assert concepts.asked == [("cat",), ("style",), ("style", "cat")]


@pytest.mark.parametrize("kind", ["clip", "t5"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_takes_the_vectors_too(encoders: Mapping[str, Encoder], kind: str, dtype: str) -> None:
    encoder = encoders[kind]
    concepts, rows = table(encoder.part.width), rows_of(encoder)
    trunk = load_trunk(encoder.part, getattr(torch, dtype), {})
    half = TextTower(replace(encoder, outputs=("hidden",)), trunk, torch.device("cpu"), concepts).encode(rows)
    for ours, exact in zip(half, loaded(encoder, concepts, ("hidden",)).encode(rows), strict=True):
        assert ours["hidden"].dtype is getattr(torch, dtype)
        assert torch.cosine_similarity(ours["hidden"].float(), exact["hidden"], dim=-1).min() > 0.99


@pytest.mark.parametrize(
    "row",
    [
        Row((1, FIRST_CONCEPT_ID, 2)),
        Row((1, FIRST_CONCEPT_ID + 2, 2), None, ("cat",)),
        Row((1, FIRST_CONCEPT_ID, 2), None, ("wide",)),
        Row((1, FIRST_CONCEPT_ID - 1, 2), None, ("cat",)),
    ],
    ids=["no-concept", "too-few-vectors", "another-width", "no-word"],
)
def test_vectors_that_are_not_there_are_an_error_and_no_forward(encoders: Mapping[str, Encoder], row: Row) -> None:
    encoder = encoders["t5"]
    concepts = table(encoder.part.width)
    concepts.concepts["wide"] = torch.zeros(1, encoder.part.width + 1)
    tower = loaded(encoder, concepts)
    with pytest.raises(ValueError):
        tower.encode([Row((4, 5, 6)), row])
    assert (tower.forwards, tower.rows) == (0, 0)


def test_a_tower_that_was_given_no_table_knows_no_concept(encoders: Mapping[str, Encoder]) -> None:
    with pytest.raises(ValueError):
        make(encoders["t5"]).encode([Row((1, FIRST_CONCEPT_ID, 2), None, ("cat",))])


def test_what_the_table_says_goes_through(encoders: Mapping[str, Encoder]) -> None:
    encoder = encoders["clip"]
    with pytest.raises(BackendUnavailable, match="no file has it"):
        loaded(encoder, Table()).encode(rows_of(encoder))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_vectors_that_are_read_and_no_other(encoders: Mapping[str, Encoder], kind: str) -> None:
    encoder = encoders[kind]
    trunk = load_trunk(encoder.part, torch.float32, {})
    vectors = torch.randn(3, encoder.part.width, generator=torch.Generator().manual_seed(3)).requires_grad_()
    ids = torch.tensor([put(random_rows(encoder, 1)[0], 2, 0, 2)])
    (found,) = trunk.forward(ids, [Read(encoder.part.layers, norm=True)], vectors)
    found.square().sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.abs().sum(1).gt(0).tolist() == [True, False, True]
