"""One encoder over several places. Without GPUs these are memory and disk: two devices, as far as the hooks know."""

import logging
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.towers import make, random_rows

from serve.encoders.registry import Encoder
from serve.encoders.shard import devices_here, plan_map, spread


@pytest.mark.parametrize("places", [(0,), (0, 1), (0, 1, 2), tuple(range(9))])
@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_the_map_is_in_order_whole_and_even(
    wide_encoders: Mapping[str, Encoder], kind: str, places: tuple[int, ...]
) -> None:
    model = make(wide_encoders[kind], ("hidden",))._trunk.model
    placed = plan_map(model, places)
    assert all(second >= first for first, second in pairwise(placed.values()))
    for name, _ in model.named_parameters():
        assert sum(name.startswith(f"{module}.") for module in placed) == 1, name
    layers = [name for name in placed if ".layers." in name or ".block." in name]
    assert len(layers) == wide_encoders[kind].part.layers
    seen: set[int] = set()
    held = dict.fromkeys(places, 0)
    sizes = []
    for name, place in placed.items():
        fresh = {id(p): p.nbytes for p in model.get_submodule(name).parameters() if id(p) not in seen}
        seen.update(fresh)
        sizes.append(sum(fresh.values()))
        held[place] += sizes[-1]
    assert max(held.values()) <= sum(sizes) / len(places) + max(sizes)


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("kind", ["t5", "clip-projected"])
def test_spread_it_gives_the_same_bits(
    encoders: Mapping[str, Encoder], tmp_path: Path, kind: str, quantization: str
) -> None:
    encoder = encoders[kind]
    whole, parted = (make(encoder, quantization=quantization) for _ in range(2))
    model = parted._trunk.model
    spread(model, plan_map(model, ("cpu", "disk")), tmp_path)
    last = parted._trunk.layers[-1]
    assert {each.device.type for each in last.parameters()} == {"meta"}  # on disk, until it runs
    assert {each.device.type for each in model.get_input_embeddings().parameters()} == {"cpu"}
    rows = random_rows(encoder, 3)
    for found, expected in zip(parted.encode(rows), whole.encode(rows), strict=True):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    assert {each.device.type for each in last.parameters()} == {"meta"}


def test_one_device_serves_it_whole_and_says_so(
    encoders: Mapping[str, Encoder], caplog: pytest.LogCaptureFixture
) -> None:
    assert devices_here("cpu") == ("cpu",)
    rows = random_rows(encoders["t5"], 2)
    with caplog.at_level(logging.WARNING):
        tower = make(encoders["t5"], shard=True)
    assert "only one device" in caplog.text
    for found, expected in zip(tower.encode(rows), make(encoders["t5"]).encode(rows), strict=True):
        assert torch.equal(found["hidden"], expected["hidden"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("kind", ["t5", "clip-projected"])
def test_over_gpus(encoders: Mapping[str, Encoder], kind: str, quantization: str) -> None:
    tower = make(encoders[kind], device="cuda", shard=True, quantization=quantization)
    assert len({each.device for each in tower._trunk.model.parameters()}) == torch.cuda.device_count()
    rows = random_rows(encoders[kind], 3)
    whole = make(encoders[kind], device="cuda", quantization=quantization)
    for found, expected in zip(tower.encode(rows), whole.encode(rows), strict=True):
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, atol=1e-5, rtol=0), name
