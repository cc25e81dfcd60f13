"""`torch.compile`: the same values, compiled at start and never at a request."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from support.towers import make, random_rows
from torch._dynamo.utils import counters

from serve.encoders.registry import Encoder
from serve.errors import OperatorError

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "quantization"), [("clip-projected", "none"), ("t5", "none"), ("t5", "int4")])
def test_it_equals_the_eager_one_and_no_request_compiles(
    encoders: Mapping[str, Encoder], kind: str, quantization: str
) -> None:
    encoder = encoders[kind]
    eager, before = make(encoder, quantization=quantization), graphs()
    compiled = make(encoder, quantization=quantization, compile=True)
    assert (compiled.forwards, compiled.rows) == (0, 0)
    # CLIP's layers share a graph, T5's first has one of its own; a single row has its own.
    assert (built := graphs()) == before + (2 if kind == "clip-projected" else 4)
    lengths = [77] if kind == "clip-projected" else [1, 2, 20, 77, 130]
    with ThreadPoolExecutor(1) as thread:  # requests don't run in the thread that loaded it
        for length in lengths:
            for count in (1, 2, 3, 8):
                rows = [replace(row, extra="skip:2") for row in random_rows(encoder, count, length)]
                ours = thread.submit(compiled.encode, rows).result()
                for found, expected in zip(ours, eager.encode(rows), strict=True):
                    assert found.keys() == expected.keys()
                    for name, tensor in expected.items():
                        assert torch.allclose(found[name], tensor, atol=1e-5, rtol=0), (name, count, length)
        masked = [replace(row, hidden=(2, 3)) for row in random_rows(encoder, 2)]
        ours = thread.submit(compiled.encode, masked).result()
        for found, expected in zip(ours, eager.encode(masked), strict=True):
            for name, tensor in expected.items():
                assert torch.allclose(found[name], tensor, atol=1e-5, rtol=0), name
    assert graphs() == built


def test_without_a_compiler_it_names_the_setting(encoders: Mapping[str, Encoder]) -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}),
        pytest.raises(OperatorError, match=r"encoder.compile: does not work here") as raised,
    ):
        make(encoders["clip"], compile=True)
    assert raised.value.param == "encoder.compile"
