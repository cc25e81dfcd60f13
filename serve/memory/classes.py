"""Kinds of GPU: how much one holds, and how fast it is by its data sheet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.memory.terms import Dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuClass:
    """`memory_gb` are 10^9 bytes. `dtypes` are those that it computes in at full speed, the best first.

    The figures of speed are the makers' peaks: `tflops` of dense matrix products with float32 sums, as torch makes
    them, by dtype; `bandwidth_gb_s` of its memory; `pcie_gb_s` of its link in one direction. None or empty: not known,
    and nothing is predicted from it. `like` is the card that they are of.
    """

    name: str
    memory_gb: float
    dtypes: tuple[Dtype, ...]
    tflops: Mapping[Dtype, float] = field(default_factory=dict)
    bandwidth_gb_s: float | None = None
    pcie_gb_s: float | None = None
    like: str = ""

    @property
    def memory_bytes(self) -> float:
        return self.memory_gb * 1e9


_AMPERE: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
"""And later."""
_TURING: tuple[Dtype, ...] = ("float16", "float32")


def _half(tflops: float, single: float) -> Mapping[Dtype, float]:
    """Tensor cores take both halves alike; float32 is computed outside of them, exactly."""
    return {"float16": tflops, "bfloat16": tflops, "float32": single}


BUILT_IN: Mapping[str, GpuClass] = {
    each.name: each
    for each in (
        GpuClass(
            name="4gb",
            memory_gb=4,
            dtypes=_AMPERE,
            tflops=_half(11.5, 5.7),
            bandwidth_gb_s=192,
            pcie_gb_s=15.8,
            like="GeForce RTX 3050 Laptop",
        ),
        GpuClass(
            name="8gb",
            memory_gb=8,
            dtypes=_AMPERE,
            tflops=_half(30.2, 15.1),
            bandwidth_gb_s=272,
            pcie_gb_s=15.8,
            like="GeForce RTX 4060",
        ),
        GpuClass(
            name="11gb",
            memory_gb=11,
            dtypes=_TURING,
            tflops={"float16": 53.8, "float32": 13.4},
            bandwidth_gb_s=616,
            pcie_gb_s=15.8,
            like="GeForce RTX 2080 Ti",
        ),
        GpuClass(
            name="24gb",
            memory_gb=24,
            dtypes=_AMPERE,
            tflops=_half(71.0, 35.6),
            bandwidth_gb_s=936,
            pcie_gb_s=31.5,
            like="GeForce RTX 3090",
        ),
        GpuClass(
            name="80gb",
            memory_gb=80,
            dtypes=_AMPERE,
            tflops=_half(312.0, 156.0),
            bandwidth_gb_s=2039,
            pcie_gb_s=31.5,
            like="A100 80 GB SXM",
        ),
    )
}
"""By name, the smallest first. The figures are of the makers' data sheets:

- RTX 3050 Laptop: 2048 cores (16 multiprocessors of 512 half-precision operations with float32 sums a clock), 1.06 to
  1.74 GHz by the laptop's power limit, 1.4 taken; GDDR6 of 128 bits at 12 Gbit/s; PCIe 4.0 x8 (NVIDIA, "GeForce RTX 30
  Series Laptops", compare).
- RTX 4060: 24 multiprocessors of the same width at 2.46 GHz; 272 GB/s; PCIe 4.0 x8 (NVIDIA Ada GPU architecture
  whitepaper). The slower of the 8 GB cards that are common; an RTX 3060 Ti has 32.4 TFLOPS and 448 GB/s.
- RTX 2080 Ti: 53.8 TFLOPS with float32 sums at the reference clock, 616 GB/s, PCIe 3.0 x16, no bfloat16 (NVIDIA Turing
  GPU architecture whitepaper, table 4).
- RTX 3090: 71 TFLOPS with float32 sums, 936 GB/s, PCIe 4.0 x16 (NVIDIA Ampere GA102 whitepaper, table 9).
- A100 80 GB SXM: 312 TFLOPS, 2039 GB/s, PCIe 4.0 x16 (NVIDIA A100 data sheet).
"""
