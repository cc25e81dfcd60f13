"""int8 and int4 weights: small, close, and blind to a row's neighbours. Bounds are for random weights of width 256."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.towers import cosines, make, random_rows
from torch import nn

from serve.encoders.registry import Encoder
from serve.errors import OperatorError
from serve.quantize import BITS, BlockwiseLinear, load_library, quantize

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LEAST = {"int8": 0.999, "int4": 0.95}
"""Least cosine of a token's embedding to the one in float32."""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_it_is_close_to_the_exact_one(
    wide_encoders: Mapping[str, Encoder], kind: str, quantization: str, dtype: str, device: str
) -> None:
    if device == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(False):
        pytest.skip("this GPU has no bfloat16")
    encoder = wide_encoders[kind]
    rows = random_rows(encoder, 6)
    exact = make(encoder, ("hidden",)).encode(rows)
    small = make(encoder, ("hidden",), device=device, dtype=dtype, quantization=quantization)
    for ours, expected in zip(small.encode(rows), exact, strict=True):
        assert ours["hidden"].dtype is getattr(torch, dtype)
        assert cosines(ours["hidden"], expected["hidden"]).min() > LEAST[quantization]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_rows_neighbours_do_not_matter(
    wide_encoders: Mapping[str, Encoder], kind: str, quantization: str, device: str
) -> None:
    encoder = wide_encoders[kind]
    tower = make(encoder, ("hidden",), device=device, quantization=quantization)
    rows = random_rows(encoder, 7)
    for row, together in zip(rows, tower.encode(rows), strict=True):
        (alone,) = tower.encode([row])
        assert torch.allclose(together["hidden"], alone["hidden"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("quantization", "bits"), [("int8", 8 + 32 / 128), ("int4", 4 + 32 / 64)])
@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_its_bytes_are_true(wide_encoders: Mapping[str, Encoder], kind: str, quantization: str, bits: float) -> None:
    encoder = wide_encoders[kind]
    exact = make(encoder, ("hidden",))
    linears = [m for layer in exact._trunk.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    weights = sum(linear.weight.numel() for linear in linears)
    steps = 256 * 4 if quantization == "int8" else 0
    small = make(encoder, ("hidden",), quantization=quantization)
    assert small.nbytes == exact.nbytes - weights * 4 + weights * bits / 8 + steps
    assert not any(isinstance(m, nn.Linear) for layer in small._trunk.layers for m in layer.modules())


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_only_the_layers_are_quantized(encoders: Mapping[str, Encoder], quantization: str) -> None:
    encoder = encoders["clip-projected"]
    rows = random_rows(encoder, 2)
    exact, small = make(encoder, ("skip:3",)), make(encoder, ("skip:3",), quantization=quantization)
    for ours, expected in zip(small.encode(rows), exact.encode(rows), strict=True):
        assert torch.equal(ours["skip:3"], expected["skip:3"])  # the embedding, below all layers
    ((name, _),) = encoder.projections
    assert torch.equal(small._trunk.projections[name], exact._trunk.projections[name])


@pytest.mark.parametrize("bits", list(BITS.values()))
@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (40, 100)])
def test_each_weight_is_off_by_half_a_step_of_its_block(bits: int, shape: tuple[int, int]) -> None:
    linear = nn.Linear(shape[1], shape[0])
    (layers := nn.Sequential(linear)).requires_grad_(False)
    original = linear.weight.clone()
    with torch.inference_mode():
        quantize([layers], bits, torch.device("cpu"))
    (small,) = layers
    assert isinstance(small, BlockwiseLinear)
    # 127 even steps; NF4's widest, between -1 and its next value, is 0.304.
    step = 1 / 127 if bits == 8 else 0.305
    assert (small.unpacked() - original).abs().max() <= original.abs().max() * step / 2 * 1.01
    x = torch.randn(4, shape[1])
    assert torch.equal(small(x), nn.functional.linear(x, small.unpacked(), linear.bias))


def test_without_the_library_it_names_the_setting(
    encoders: Mapping[str, Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(OperatorError, match=r"encoder.quantization: int8 needs .*bitsandbytes") as raised:
        make(encoders["clip"], quantization="int8")
    assert raised.value.param == "encoder.quantization"


def test_it_fetches_no_code_from_the_hub(tmp_path: Path) -> None:
    """Where the package `kernels` is installed, bitsandbytes on some CPUs loads machine code with it as it starts."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')")
    script = "from serve.quantize import load_library; load_library(); import sys; print(len(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "kernels" not in done.stderr
    assert load_library().__name__ == "bitsandbytes"
