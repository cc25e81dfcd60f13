"""How long an image takes on a card that nobody has measured yet: the sum, term by term.

A guess from data sheets, good to about a third (docs/memory.md holds it against published times). What a replica
measures of its own steps, and what clients are told of their waiting, does not come from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from serve.memory.classes import GpuClass
from serve.memory.flops import decoding, forward
from serve.memory.planner import Plan
from serve.memory.terms import BYTES, ModelShape
from serve.memory.weights import BITS, vae_dtype
from serve.rungs import MEANS

UNETS = frozenset({"sd", "sdxl", "sdxl_refiner"})
"""Families."""
UNET_EFFICIENCY = 0.73
"""Share of a card's peak that a U-Net's products reach, without compiling. With LAUNCH_S from two published times of
SDXL at 1024 x 1024, guided: 0.40 s a step on an RTX 2080 Ti (30 steps in 12.2 s, 25 in 10.2 s), and 50 steps in 5.93 s
on an A100 (fal.ai, https://github.com/fal-ai/stable-diffusion-benchmarks, diffusers with torch 2.1)."""
TRANSFORMER_EFFICIENCY = 0.55
"""The same of transformers, whose modulations and norms are many small kernels. Between FLUX.1 dev at 1024 x 1024 on an
L20 of 119.5 TFLOPS, 28 steps in 26.4 s (https://huggingface.co/docs/diffusers/optimization/para_attn), and SD 3 Medium
on an A100, 28 steps in 4.8 s with its text (https://huggingface.co/blog/sd3)."""
LAUNCH_S = 62e-6
"""Seconds of a step for each of its products, whatever its size: its launch, and the small kernels around it."""
VAE_EFFICIENCY = 0.40
"""Of a decoder, whose norms over whole images take as long as its convolutions."""
MEMORY_EFFICIENCY = 0.75
"""Share of the bandwidth of a card's memory that streaming weights reaches."""
PINNED_EFFICIENCY, PAGEABLE_EFFICIENCY = 0.75, 0.35
"""Share of the link's peak that copies from locked and from ordinary memory reach."""


@dataclass(frozen=True, slots=True)
class Term:
    """`how` is the arithmetic as a person reads it."""

    name: str
    seconds: float
    how: str


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one image at the planned size, alone on its card, its text encoded elsewhere."""

    steps: int
    terms: tuple[Term, ...]

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.terms)


def predicted(shape: ModelShape, gpu: GpuClass, plan: Plan, steps: int, images: int = 1) -> Speed | None:
    """Of so many images that step together; None where the class' figures are not known, and for the CPU's rung."""
    if plan.dtype not in gpu.tflops or not (gpu.bandwidth_gb_s and gpu.pcie_gb_s) or not MEANS[plan.rung].on_card:
        return None
    return Speed(steps, tuple(_terms(shape, gpu, plan, steps, images)))


def _terms(shape: ModelShape, gpu: GpuClass, plan: Plan, steps: int, images: int) -> Iterator[Term]:
    assert gpu.bandwidth_gb_s
    means, tflops = MEANS[plan.rung], gpu.tflops[plan.dtype]
    work = forward(shape, plan.width, plan.height)
    lanes = shape.lanes * images
    share = UNET_EFFICIENCY if shape.family in UNETS else TRANSFORMER_EFFICIENCY
    products = steps * lanes * work.flops / (tflops * 1e12 * share)
    yield Term(
        "products",
        products,
        f"{steps} steps x {lanes} lane{'s' * (lanes > 1)} x {_tera(work.flops)} / "
        f"({tflops:g} TFLOP/s x {share * 100:.0f} %)",
    )
    launches = steps * work.products * LAUNCH_S
    yield Term("launches", launches, f"{steps} steps x {work.products} products x {LAUNCH_S * 1e6:.0f} us")
    if means.weights != "plain":
        # Read packed, written as numbers, and read again by the product.
        moved = shape.linear * (BITS[means.weights] / 8 + 2 * BYTES[plan.dtype])
        yield Term(
            "unpacking",
            steps * moved / (gpu.bandwidth_gb_s * 1e9 * MEMORY_EFFICIENCY),
            f"{steps} steps x {_giga(moved)} / ({gpu.bandwidth_gb_s:g} GB/s x {MEMORY_EFFICIENCY * 100:.0f} %)",
        )
    if means.offload != "none":
        yield _transfer(shape, gpu, plan, steps, products + launches)
    decode = decoding(shape, plan.width, plan.height, plan.tile)
    dtype = vae_dtype(shape, plan.dtype)
    rate = gpu.tflops.get(dtype, tflops)
    yield Term(
        "decoding",
        images * decode.flops / (rate * 1e12 * VAE_EFFICIENCY),
        f"{images} x {_tera(decode.flops)} / ({rate:g} TFLOP/s x {VAE_EFFICIENCY * 100:.0f} %) in {dtype}",
    )


def _transfer(shape: ModelShape, gpu: GpuClass, plan: Plan, steps: int, computing: float) -> Term:
    """Groups come while the ones before them compute, so only what that does not hide is waited for. Layers come one
    after the other."""
    assert gpu.pcie_gb_s
    ahead = MEANS[plan.rung].offload == "group"
    moved = (shape.parameters - (shape.outside if ahead else 0)) * BYTES[plan.dtype]
    share = PINNED_EFFICIENCY if ahead else PAGEABLE_EFFICIENCY
    seconds = steps * moved / (gpu.pcie_gb_s * 1e9 * share)
    how = f"{steps} steps x {_giga(moved)} / ({gpu.pcie_gb_s:g} GB/s x {share * 100:.0f} %)"
    if not ahead:
        return Term("transfers", seconds, how)
    hidden = min(seconds, computing)
    return Term("transfers", seconds - hidden, f"{how}, of which {hidden:.1f} s behind the computing")


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.3g} TFLOP"


def _giga(moved: float) -> str:
    return f"{moved / 1e9:.3g} GB"
