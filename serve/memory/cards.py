"""The GPUs of this machine, as the driver's own tool tells them: no torch is loaded for it."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass

from serve.errors import OperatorError
from serve.memory.terms import Dtype

TOOL = "nvidia-smi"
QUERY = ("name", "memory.total", "compute_cap")
ANSWER_S = 30.0
"""Longest wait for the driver: with its persistence off it takes seconds to wake every card."""
_MIB = 2**20
_MOST_MIB = 10**9
"""Far beyond what any card has."""
_SHOWN = 120
"""Characters of an answer that is none."""
_BFLOAT16 = (8, 0)
"""Compute capability from which on a card multiplies it at full speed."""


class NoDriver(OperatorError):
    """This machine has no NVIDIA driver, so presumably no card of theirs."""


@dataclass(frozen=True, slots=True)
class Found:
    """`number` cards of one kind; `memory_bytes` are one card's."""

    name: str
    memory_bytes: int
    dtypes: tuple[Dtype, ...]
    number: int


def cards_here() -> tuple[Found, ...]:
    """The kinds of NVIDIA cards here, in the driver's order. Raises NoDriver where the tool is not here, another
    OperatorError that names it where it fails or sees no card."""
    path = shutil.which(TOOL)
    if path is None:
        raise NoDriver(f"no {TOOL} is here", TOOL)
    asked = [path, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, errors="replace", timeout=ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        raise _failed(f"does not answer within {ANSWER_S:g} s") from None
    except OSError as error:
        raise _failed(error.strerror or "can't be run") from None
    if told.returncode:
        lines = (told.stdout + told.stderr).strip().splitlines()
        raise _failed(lines[-1] if lines else f"ended with {told.returncode}")
    try:
        rows = [row for row in csv.reader(told.stdout.splitlines(), skipinitialspace=True) if row]
    except csv.Error as error:
        raise _failed(f"says what is no table: {error}") from None
    cards = Counter(map(_card, rows))
    if not cards:
        raise _failed("sees no card")
    return tuple(Found(*card, number) for card, number in cards.items())


def _card(row: list[str]) -> tuple[str, int, tuple[Dtype, ...]]:
    """Of one line: `NVIDIA GeForce RTX 2080 Ti, 11264, 7.5`. Raises OperatorError."""
    try:
        name, memory, capability = (field.strip() for field in row)
        major, _, minor = capability.partition(".")
        return name.removeprefix("NVIDIA "), _bytes(memory), _dtypes((int(major), int(minor or 0)))
    except ValueError:
        said = ", ".join(row)
        shown = said if len(said) <= _SHOWN else f"{said[:_SHOWN]}..."
        raise _failed(f"says {shown!r}, not {', '.join(QUERY)}") from None


def _bytes(mebibytes: str) -> int:
    """Raises ValueError for what no card has."""
    found = int(mebibytes)
    if not 0 < found <= _MOST_MIB:
        raise ValueError(mebibytes)
    return found * _MIB


def _dtypes(capability: tuple[int, int]) -> tuple[Dtype, ...]:
    return ("bfloat16", "float16", "float32") if capability >= _BFLOAT16 else ("float16", "float32")


def _failed(reason: str) -> OperatorError:
    return OperatorError(f"{TOOL} {reason}", TOOL)
