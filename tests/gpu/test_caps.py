"""What a process may allocate is what its plan gives it."""

import subprocess
import sys

import pytest
import torch

from serve.bench.gpu_memory import capped
from serve.devices import Card, gpu_usage

GIB = 2**30
HOLDER = """
import sys
import torch
from serve.devices import claim_device, device_errors
from serve.errors import OutOfMemory
device = claim_device("cuda", float(sys.argv[1]), "diffusion.device", int(sys.argv[2]) or None)
held = []
try:
    with device_errors("the denoiser"):
        while True:
            held.append(torch.empty(64 * 2**20, dtype=torch.uint8, device=device))
except OutOfMemory:
    print(torch.cuda.max_memory_reserved(), flush=True)
sys.stdin.read()
"""


def holder(num_gpus: float, budget: int) -> "subprocess.Popen[str]":
    """A process that takes all that it may of the card, says how much that is, and holds it."""
    command = [sys.executable, "-c", HOLDER, str(num_gpus), str(budget)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def taken(process: "subprocess.Popen[str]") -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_nothing_is_allocated_beyond_the_cap(cuda: torch.device) -> None:
    with capped(cuda, 2 * GIB):
        held = [torch.empty(GIB, dtype=torch.uint8, device=cuda)]
        with pytest.raises(torch.OutOfMemoryError):
            held.append(torch.empty(GIB + GIB // 8, dtype=torch.uint8, device=cuda))
        usage = gpu_usage()
        assert usage is not None
        assert usage.allowed == pytest.approx(2 * GIB, rel=1e-3)
        assert GIB <= usage.peak <= usage.allowed
        del held
    torch.empty(2 * GIB + GIB // 4, dtype=torch.uint8, device=cuda)


def test_segments_grow_in_place(cuda: torch.device) -> None:
    held = torch.empty(GIB // 8, dtype=torch.uint8, device=cuda)
    assert all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
    del held


def test_two_halves_of_a_card_never_take_each_others_memory(cuda: torch.device, card: Card) -> None:
    """Each takes all that it may, one after the other, and the second gets as much as the first."""
    budget = int(0.35 * card.memory_bytes)
    first, second = holder(0.5, budget), holder(0.5, budget)
    try:
        amounts = taken(first), taken(second)
        assert all(budget - GIB // 4 < amount <= budget for amount in amounts)
    finally:
        for each in (first, second):
            each.communicate()
