"""Data sheets of cards that people have, by the names that the driver gives them: the speed of a card that
`tandem plan --from-nvidia-smi` finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from serve.memory.classes import GpuClass

_PCIE_3, _PCIE_4, _PCIE_4_X8, _PCIE_5 = 15.8, 31.5, 15.8, 63.0
"""GB/s in one direction, of sixteen lanes but where it says eight."""

SHEETS: Mapping[str, tuple[float, float, float, float]] = {
    "GeForce RTX 2060": (25.8, 6.5, 336, _PCIE_3),
    "GeForce RTX 2070": (29.9, 7.5, 448, _PCIE_3),
    "GeForce RTX 2070 SUPER": (36.3, 9.1, 448, _PCIE_3),
    "GeForce RTX 2080": (40.3, 10.1, 448, _PCIE_3),
    "GeForce RTX 2080 SUPER": (44.6, 11.2, 496, _PCIE_3),
    "GeForce RTX 2080 Ti": (53.8, 13.4, 616, _PCIE_3),
    "TITAN RTX": (130.5, 16.3, 672, _PCIE_3),
    "GeForce RTX 3050 Laptop GPU": (11.5, 5.7, 192, _PCIE_4_X8),
    "GeForce RTX 3060": (25.5, 12.7, 360, _PCIE_4),
    "GeForce RTX 3060 Ti": (32.4, 16.2, 448, _PCIE_4),
    "GeForce RTX 3070": (40.6, 20.3, 448, _PCIE_4),
    "GeForce RTX 3080": (59.5, 29.8, 760, _PCIE_4),
    "GeForce RTX 3080 Ti": (68.2, 34.1, 912, _PCIE_4),
    "GeForce RTX 3090": (71.0, 35.6, 936, _PCIE_4),
    "GeForce RTX 4060": (30.2, 15.1, 272, _PCIE_4_X8),
    "GeForce RTX 4060 Ti": (44.1, 22.1, 288, _PCIE_4_X8),
    "GeForce RTX 4070": (58.3, 29.1, 504, _PCIE_4),
    "GeForce RTX 4070 Ti": (80.2, 40.1, 504, _PCIE_4),
    "GeForce RTX 4080": (97.5, 48.7, 717, _PCIE_4),
    "GeForce RTX 4090": (165.2, 82.6, 1008, _PCIE_4),
    "RTX A4000": (76.7, 38.3, 448, _PCIE_4),
    "RTX A6000": (154.8, 77.4, 768, _PCIE_4),
    "Tesla T4": (65.0, 8.1, 320, _PCIE_3),
    "Tesla V100-SXM2-16GB": (125.0, 15.7, 900, _PCIE_3),
    "Tesla V100-SXM2-32GB": (125.0, 15.7, 900, _PCIE_3),
    "A10": (125.0, 62.5, 600, _PCIE_4),
    "L4": (121.0, 60.0, 300, _PCIE_4),
    "L40S": (362.0, 183.0, 864, _PCIE_4),
    "A100-SXM4-40GB": (312.0, 156.0, 1555, _PCIE_4),
    "A100-PCIE-40GB": (312.0, 156.0, 1555, _PCIE_4),
    "A100-SXM4-80GB": (312.0, 156.0, 2039, _PCIE_4),
    "A100 80GB PCIe": (312.0, 156.0, 1935, _PCIE_4),
    "H100 PCIe": (756.0, 378.0, 2000, _PCIE_5),
    "H100 80GB HBM3": (989.0, 494.0, 3350, _PCIE_5),
}
"""Peaks in TFLOP/s, dense and with float32 sums: of both halves, of float32 (of TF32 where the card has it, in which
torch computes convolutions); memory in GB/s; link in GB/s. From NVIDIA's data sheets and architecture whitepapers; of
GeForce RTX 30 and 40 the halves are 512 operations a clock and multiprocessor at the reference boost clock."""


def with_speed(gpu: GpuClass) -> GpuClass:
    """The class with the speed of the card of its name, as it is where no sheet of that name is here."""
    if (sheet := SHEETS.get(gpu.name)) is None:
        return gpu
    half, single, memory, link = sheet
    tflops = {dtype: single if dtype == "float32" else half for dtype in gpu.dtypes}
    return replace(gpu, tflops=tflops, bandwidth_gb_s=memory, pcie_gb_s=link)
