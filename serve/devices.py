"""Which device a replica computes on, and how much of it."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from serve.errors import DeviceLost, GenerationFailed, OperatorError, OutOfMemory, TandemError
from serve.settings.room import Dtype

log = logging.getLogger(__name__)

CLASS_SLACK = 0.95
"""Of a class's memory, the least that a card of it shows."""
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""torch's, the second one from before it had other accelerators."""
_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
"""In the text of torch's errors: on a CPU; on a card, of what is allocated beside torch's own memory, and of the
libraries that it computes with; on Apple's GPUs."""
_AUTOGROUP_TRIES, _AUTOGROUP_PAUSE_S = 20, 0.15


def claim_device(device: str, num_gpus: float, setting: str, budget: int | None = None) -> torch.device:
    """The device of that name, or for `auto` the best one here: cuda, then mps, then cpu.

    On a GPU this process is held to `budget` bytes, what its plan may use, and one that has a fraction of the card to
    that fraction in any case: Ray does not do it. Without either the card is not touched, only looked for. Raises
    OperatorError naming `setting` where there is no such device.
    """
    name = device if device != "auto" else best_device()
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present[name]:
        raise OperatorError(f"{setting}: there is no {name} device here", setting)
    if name == "cuda" and (num_gpus or budget):
        grow_segments()
        allowed = memory_fraction(num_gpus, budget, torch.cuda.get_device_properties(0).total_memory)
        if allowed is not None:
            torch.cuda.set_per_process_memory_fraction(allowed)
    return torch.device(name)


def memory_fraction(num_gpus: float, budget: int | None, total: int) -> float | None:
    """Of a card of `total` bytes, what a process may allocate that has `num_gpus` of it and a plan of `budget` bytes
    (None without a plan); None where it may take all.

    What CUDA itself takes of the card is not counted by torch, so that a plan's budget leaves it room beside this.
    """
    share = num_gpus if 0 < num_gpus < 1 else 1.0
    allowed = share if budget is None else min(share, budget / total)
    return allowed if allowed < 1 else None


def grow_segments() -> None:
    """Have torch's allocator grow its segments in place, so that memory which was given back in one size serves
    another: images of all sizes come and go, and under a cap there is no other memory to go to.

    What the operator says in one of torch's own variables stands. To be called before anything lies on the card.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as it is found. `dtypes` are those that it computes in by itself, the best first."""

    name: str
    memory_bytes: int
    dtypes: tuple[Dtype, ...]


def card_here(device: str) -> Card | None:
    """The card that a replica on `device` computes on; None where that is no CUDA GPU."""
    if (device if device != "auto" else best_device()) != "cuda":
        return None
    found = torch.cuda.get_device_properties(0)
    own: tuple[Dtype, ...] = ("bfloat16",) if torch.cuda.is_bf16_supported(False) else ()
    return Card(found.name, found.total_memory, (*own, "float16", "float32"))


def check_memory(device: str, memory_gb: float, setting: str) -> None:
    """OperatorError naming `setting` where the GPU here has clearly less memory than its class is said to have.

    A card keeps some of what is printed on its box for itself. Nothing is said of a replica that runs on no GPU.
    """
    if (device if device != "auto" else best_device()) != "cuda":
        return
    present_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    if present_gb < CLASS_SLACK * memory_gb:
        raise OperatorError(f"{setting}: it has {memory_gb:g} GB, the GPU here {present_gb:.1f} GB", setting)


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def check_dtype(device: torch.device, dtype: str, setting: str) -> None:
    """OperatorError naming `setting` where `device` can't compute in `dtype`, a torch dtype's name.

    Emulated bfloat16 (GPUs before Ampere) counts as not there: it is slower than float32. float16 on a CPU is let
    through, because it is right and saves memory, but several times slower than float32.
    """
    wanted = getattr(torch, dtype)
    if device.type == "cuda" and wanted is torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
        raise OperatorError(f"{setting}: this GPU has no bfloat16; take float16 or float32", setting)
    try:
        sample = torch.ones(2, 2, dtype=wanted, device=device)
        torch.nn.functional.layer_norm(torch.nn.functional.linear(sample, sample), (2,))
    except (RuntimeError, TypeError, NotImplementedError):
        raise OperatorError(f"{setting}: torch can't compute in {dtype} on {device.type} here", setting) from None


def use_threads(threads: int | None) -> None:
    """CPU threads of this process; None leaves one core to the rest of the server.

    Ray would leave a replica one for each CPU that it reserves. Threads that wait for each other at every small
    operation lose more by sharing a core than they win by another.
    """
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) - 1))


def be_nice(niceness: int) -> None:
    """The calling thread yields the cores to threads of a lower niceness; 0 leaves it as it is. On Linux: elsewhere all
    threads of a process have the same."""
    if niceness and sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def use_cores(threads: int | None, niceness: int) -> None:
    """The calling thread computes on the CPU from now on, with `use_threads`, and `be_nice`."""
    use_threads(threads)
    be_nice(niceness)


def stand_back(niceness: int) -> None:
    """This process, its nice threads and all, yields the cores to the rest of the server.

    Where Linux shares the cores out between sessions first (autogroup, the default of desktops), a thread is nice
    inside its session alone, and a session of nice threads has kept Redis waiting for half a second. So the process
    gets a session of its own, as nice as its threads.
    """
    if sys.platform != "linux":
        return
    if os.getsid(0) != os.getpid():
        try:
            # Ray lets each worker lead a group of processes, and only who leads none may begin a session.
            os.setpgid(0, os.getpgid(os.getppid()))
            os.setsid()
        except OSError as error:  # a process that it has started is in its group
            log.warning("no session of its own, so that its niceness may not count: %s", error)
            with suppress(OSError):
                os.setpgid(0, 0)
            return
    for _ in range(_AUTOGROUP_TRIES):
        try:
            Path("/proc/self/autogroup").write_text(str(niceness))
        except BlockingIOError:  # who is not root may write only so often, whoever else has written
            time.sleep(_AUTOGROUP_PAUSE_S)
        except OSError:  # a kernel without autogroup
            return
        else:
            return
    log.warning("the kernel doesn't take the niceness of this session, so that it may not count")


@contextmanager
def device_errors(part: str) -> Iterator[None]:
    """torch's errors as ours; `part` is who computes, as messages name it.

    Raises OutOfMemory (what was computed is let go of, so that less of it may be tried at once), DeviceLost (every
    later call fails too), GenerationFailed.
    """
    try:
        yield
    except TandemError:
        raise
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):  # the device goes on, whatever kind of error says it
            let_go(error)
            raise OutOfMemory(f"{part}: the device ran out of memory") from error
        if isinstance(error, torch.AcceleratorError):
            raise DeviceLost(f"{part}: the device failed") from error
        raise GenerationFailed(f"{part} failed on this request") from error


@contextmanager
def undoing(undo: Callable[[], None], part: str) -> Iterator[None]:
    """What is raised inside is raised once `undo` has put `part` back as it was. Raises DeviceLost where that fails
    too: it can't compute any more, and another process has to."""
    try:
        yield
    except BaseException as error:
        let_go(error)
        try:
            undo()
        except Exception as again:
            raise DeviceLost(f"{part} could not be put back as it was") from again
        raise


def let_go(error: BaseException) -> None:
    """Give back what was computed, or loaded, until that error was raised."""
    traceback.clear_frames(error.__traceback__)  # they hold the tensors, and only free blocks are given back
    gc.collect()  # so do frames of errors before this one, in cycles that nobody would look for yet
    torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or this machine, has no memory left. For most kinds of memory torch has no error of a kind."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(says in str(error) for says in _NO_MEMORY)


@dataclass(frozen=True, slots=True)
class GpuUsage:
    """This process's share of its GPUs, in bytes: allocated now, at most so far, what it may allocate, and what the
    cards have. `utilization` is the share of time in which they work for anybody, None where NVIDIA's library
    (nvidia-ml-py) can't be asked."""

    allocated: int
    peak: int
    allowed: int
    total: int
    utilization: float | None


def gpu_usage() -> GpuUsage | None:
    """None for a process that computes on no CUDA device."""
    if not torch.cuda.is_initialized():
        return None
    cards = range(torch.cuda.device_count())
    try:
        utilization = sum(torch.cuda.utilization(card) for card in cards) / len(cards) / 100
    except Exception:  # noqa: BLE001  NVML's errors are of its own package, which may not be here
        utilization = None
    totals = [torch.cuda.get_device_properties(card).total_memory for card in cards]
    fractions = [torch.cuda.get_per_process_memory_fraction(card) for card in cards]
    return GpuUsage(
        allocated=sum(torch.cuda.memory_allocated(card) for card in cards),
        peak=sum(torch.cuda.max_memory_allocated(card) for card in cards),
        allowed=sum(int(total * fraction) for total, fraction in zip(totals, fractions, strict=True)),
        total=sum(totals),
        utilization=utilization,
    )
