"""One forward against transformers' own models, read as the stock diffusers pipelines read them."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.towers import all_outputs, cosines, make, random_rows
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel, UMT5EncoderModel

from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import Encoder

KINDS = ("clip", "clip-projected", "openclip", "t5", "umt5")
CLOSE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}
"""Most that a row's values (of size 1) may differ between a forward alone and one with others, by dtype."""


def stock(encoder: Encoder, rows: list[Row], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Every output, by name, as `encode_prompt` of diffusers 0.42 reads them."""
    part, ids = encoder.part, torch.tensor([row.token_ids for row in rows])
    if part.kind != "clip":
        model = (
            {"t5": T5EncoderModel, "umt5": UMT5EncoderModel}[part.kind]
            .from_pretrained(part.weights, dtype=dtype)
            .eval()
        )
        norm = model.encoder.final_layer_norm
    elif part.projection is not None:
        model = CLIPTextModelWithProjection.from_pretrained(part.weights, dtype=dtype).eval()
        norm = model.text_model.final_layer_norm
    else:
        model = CLIPTextModel.from_pretrained(part.weights, dtype=dtype).eval()
        norm = model.final_layer_norm
    with torch.inference_mode():
        plain, deep = model(ids), model(ids, output_hidden_states=True)
        found = {"hidden": plain.last_hidden_state}
        # T5's last state is tied to the normed one, and nobody reads it without.
        for n in range(0 if part.kind == "clip" else 1, part.layers + 1):
            found[f"skip:{n}"] = deep.hidden_states[-(n + 1)]
            found[f"skip:{n}:norm"] = norm(deep.hidden_states[-(n + 1)])
        if part.projection is not None:
            found["pooled"] = model.text_model(ids).pooler_output
            found |= {f"projected:{name}": plain[0] for name, _ in encoder.projections}
        elif part.kind == "clip":
            found["pooled"] = plain.pooler_output
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_output_is_the_stock_models(encoders: Mapping[str, Encoder], kind: str) -> None:
    encoder = encoders[kind]
    rows = random_rows(encoder, 5)
    expected = stock(encoder, rows)
    assert len(expected) >= 4
    for place, found in enumerate(make(encoder, all_outputs(encoder)).encode(rows)):
        assert found.keys() == set(all_outputs(encoder))
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor[place], atol=1e-6, rtol=0), name
            assert found[name].device.type == "cpu"


@pytest.mark.parametrize("kind", ["t5", "umt5"])
@pytest.mark.parametrize("length", [1, 2, 77, 300])
def test_t5_rows_have_any_length(encoders: Mapping[str, Encoder], kind: str, length: int) -> None:
    encoder = encoders[kind]
    rows = random_rows(encoder, 2, length)
    expected = stock(encoder, rows)["hidden"]
    for found, tensor in zip(make(encoder).encode(rows), expected, strict=True):
        assert found["hidden"].shape == (length, encoder.part.width)
        assert torch.allclose(found["hidden"], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("end", [2, 5])
def test_the_pooled_row_is_the_stock_models(encoders: Mapping[str, Encoder], tmp_path: Path, end: int) -> None:
    """2 stands for the largest id of the row; any other for its own first place."""
    shutil.copytree(encoders["clip"].part.weights, tmp_path / "text_encoder")
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": end}))
    encoder = replace(
        encoders["clip"],
        part=replace(encoders["clip"].part, weights=tmp_path / "text_encoder"),
        outputs=("hidden", "pooled"),
    )
    filler = (7,) * 60
    rows = [Row((1, 5, 9, 5, 8, 2, *(6,) * 11, *filler)), Row((2, 3, 9, 9, 5, 2, *(6,) * 11, *filler))]
    expected = stock(encoder, rows)["pooled"]
    places = [2, 2] if end == 2 else [1, 4]
    for found, tensor, place in zip(make(encoder).encode(rows), expected, places, strict=True):
        assert torch.allclose(found["pooled"], tensor, atol=1e-6, rtol=0)
        assert torch.equal(found["pooled"], found["hidden"][place])


@pytest.mark.parametrize(("outputs", "ran"), [(("skip:1",), 2), (("skip:3", "skip:2:norm"), 1), (("pooled",), 3)])
def test_layers_that_nobody_reads_do_not_run(
    encoders: Mapping[str, Encoder], outputs: tuple[str, ...], ran: int
) -> None:
    tower = make(encoders["clip"], outputs)
    calls: list[int] = []
    for index, layer in enumerate(tower._trunk.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    (row,) = random_rows(encoders["clip"], 1)
    tower.encode([row])
    assert calls == list(range(ran))
    tower.encode([replace(row, extra="hidden")])
    assert calls == [*range(ran), *range(3)]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("kind", KINDS)
def test_any_batch_equals_each_alone(
    encoders: Mapping[str, Encoder],
    towers: dict[tuple[str, str], TextTower],
    kind: str,
    dtype: str,
    data: st.DataObject,
) -> None:
    encoder = encoders[kind]
    if (kind, dtype) not in towers:
        towers[kind, dtype] = make(encoder, dtype=dtype)
    tower = towers[kind, dtype]
    length = 77 if encoder.part.row_tokens else data.draw(st.sampled_from([1, 2, 8, 33]))
    pool = random_rows(encoder, 12, length)
    extras = st.sampled_from([None, *all_outputs(encoder)])
    picks = st.tuples(st.integers(0, 11), extras).map(lambda pick: replace(pool[pick[0]], extra=pick[1]))
    rows = data.draw(st.lists(picks, min_size=1, max_size=9))
    forwards, computed = tower.forwards, tower.rows
    found = tower.encode(rows)
    assert tower.forwards == forwards + 1
    assert tower.rows == computed + len({row.token_ids for row in rows})
    for row, values in zip(rows, found, strict=True):
        (alone,) = tower.encode([row])
        assert values.keys() == alone.keys() == {*encoder.outputs, *([row.extra] if row.extra else [])}
        for name, value in values.items():
            assert value.dtype is getattr(torch, dtype)
            scale = max(1.0, float(alone[name].abs().max()))
            assert torch.allclose(value, alone[name], atol=CLOSE[dtype] * scale, rtol=0), name


@pytest.fixture(scope="module")
def towers() -> dict[tuple[str, str], TextTower]:
    return {}


def test_equal_rows_are_computed_once(encoders: Mapping[str, Encoder]) -> None:
    tower = make(encoders["clip"])
    first, second = random_rows(encoders["clip"], 2)
    found = tower.encode([first, second, first, replace(first, extra="skip:2")])
    assert (tower.forwards, tower.rows) == (1, 2)
    assert torch.equal(found[0]["skip:1"], found[2]["skip:1"])
    assert torch.equal(found[0]["skip:1"], found[3]["skip:1"])
    assert not torch.equal(found[0]["skip:1"], found[1]["skip:1"])
    assert [sorted(each) for each in found] == [["skip:1"]] * 3 + [["skip:1", "skip:2"]]


def test_nothing_is_no_forward(encoders: Mapping[str, Encoder]) -> None:
    tower = make(encoders["clip"])
    assert tower.encode([]) == []
    assert tower.forwards == 0


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("t5", [Row((1, 2)), Row((1, 2, 3))]),
        ("t5", [Row(())]),
        ("t5", [Row((1, 100_000))]),
        ("t5", [Row((1, -1))]),
        ("t5", [Row((1, 2), "pooled")]),
        ("clip", [Row((1,) * 78)]),
        ("clip", [Row((1,) * 77, "skip:4")]),
        ("clip", [Row((1,) * 77, "skip:01")]),
        ("clip", [Row((1,) * 77, "skip:-1")]),
        ("clip", [Row((1,) * 77, "skip:" + "9" * 5000)]),
        ("clip", [Row((1,) * 77, "projected:00000000")]),
        ("clip", [Row((1,) * 77, "")]),
    ],
)
def test_what_it_can_not_encode_is_an_error_and_no_forward(
    encoders: Mapping[str, Encoder], kind: str, rows: list[Row]
) -> None:
    tower = make(encoders[kind])
    with pytest.raises(ValueError):
        tower.encode(rows)
    assert (tower.forwards, tower.rows) == (0, 0)


def test_two_models_with_one_trunk_read_their_own_projections(encoders: Mapping[str, Encoder], tmp_path: Path) -> None:
    own = encoders["clip-projected"]
    ((first, part),) = own.projections
    other = CLIPTextModelWithProjection.from_pretrained(part.weights)
    other.text_projection.weight.data *= -2
    other.save_pretrained(tmp_path / "text_encoder")
    both = replace(own, projections=((first, part), ("other", replace(part, weights=tmp_path / "text_encoder"))))
    tower = make(both, (f"projected:{first}", "projected:other"))
    (found,) = tower.encode(random_rows(own, 1))
    assert torch.allclose(found["projected:other"], -2 * found[f"projected:{first}"], atol=1e-5)


@pytest.mark.parametrize("kind", ["openclip", "t5", "umt5"])
def test_weights_in_several_files_are_the_same_encoder(
    encoders: Mapping[str, Encoder], tmp_path: Path, kind: str
) -> None:
    whole = encoders[kind]
    cls = {"t5": T5EncoderModel, "umt5": UMT5EncoderModel}.get(kind, CLIPTextModelWithProjection)
    cls.from_pretrained(whole.part.weights).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    moved = replace(whole.part, weights=tmp_path)
    parted = replace(whole, part=moved, projections=tuple((name, moved) for name, _ in whole.projections))
    rows = random_rows(whole, 2)
    outputs = all_outputs(whole)
    for found, expected in zip(make(parted, outputs).encode(rows), make(whole, outputs).encode(rows), strict=True):
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def test_t5_in_float16_does_not_overflow(encoders: Mapping[str, Encoder], tmp_path: Path) -> None:
    """The feed-forwards of T5 1.1 write values that float16 can't hold: their last layer stays float32."""
    model = T5EncoderModel.from_pretrained(encoders["t5"].part.weights)
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.weight.data *= 3e5
    model.save_pretrained(tmp_path / "text_encoder")
    encoder = replace(encoders["t5"], part=replace(encoders["t5"].part, weights=tmp_path / "text_encoder"))
    rows = random_rows(encoder, 3)
    for options in ({}, {"quantization": "int8"}, {"quantization": "int4"}):
        half, full = make(encoder, dtype="float16", **options), make(encoder, **options)
        assert {block.layer[1].DenseReluDense.wo(torch.ones(1, 104)).dtype for block in half._trunk.layers} == {
            torch.float32
        }
        deepest = full.encode([replace(row, extra="skip:0") for row in rows])
        assert max(float(each["skip:0"].abs().max()) for each in deepest) > torch.finfo(torch.float16).max
        for ours, exact in zip(half.encode(rows), deepest, strict=True):
            assert ours["hidden"].dtype is torch.float16
            assert cosines(ours["hidden"], exact["hidden"]).min() > (0.99 if options else 0.9999), options
    stocks = stock(encoder, rows, torch.float16)["hidden"]
    for ours, theirs in zip(make(encoder, dtype="float16").encode(rows), stocks, strict=True):
        assert torch.equal(ours["hidden"], theirs)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_its_bytes_are_those_of_its_tensors(encoders: Mapping[str, Encoder], dtype: str, size: int) -> None:
    encoder = encoders["clip-projected"]
    model = CLIPTextModelWithProjection.from_pretrained(encoder.part.weights)
    positions = model.text_model.embeddings.position_ids.nbytes
    assert make(encoder, dtype=dtype).nbytes == positions + size * sum(each.numel() for each in model.parameters())
