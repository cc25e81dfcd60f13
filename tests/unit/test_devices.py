import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve.devices import (
    ALLOCATOR_VARIABLES,
    CLASS_SLACK,
    GpuUsage,
    best_device,
    card_here,
    check_dtype,
    check_memory,
    claim_device,
    device_errors,
    gpu_usage,
    grow_segments,
    memory_fraction,
    undoing,
)
from serve.errors import DeviceLost, OperatorError, OutOfMemory
from serve.memory.planner import USABLE
from serve.settings.pools import EncoderSettings


def test_an_absent_device_names_the_setting() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(OperatorError) as raised:
        claim_device("cuda", 0.0, "encoder.device")
    assert raised.value.param == "encoder.device"


def test_auto_takes_the_best_device() -> None:
    assert claim_device("auto", 0.0, "diffusion.device").type == best_device()


def test_an_encoder_without_a_share_of_a_gpu_stays_off_it() -> None:
    assert EncoderSettings().place == "cpu"
    assert EncoderSettings(num_gpus=0.25).place == "auto"
    assert EncoderSettings(device="cuda").place == "cuda"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_cpu_can_compute_in_every_dtype_of_the_settings(dtype: str) -> None:
    check_dtype(torch.device("cpu"), dtype, "encoder.dtype")


def test_a_dtype_that_the_device_can_not_compute_in_names_the_setting() -> None:
    with pytest.raises(OperatorError, match=r"encoder.dtype: .* float8_e4m3fn on cpu") as raised:
        check_dtype(torch.device("cpu"), "float8_e4m3fn", "encoder.dtype")
    assert raised.value.param == "encoder.dtype"


def test_bfloat16_that_a_gpu_only_emulates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(OperatorError, match=r"encoder.dtype: this GPU has no bfloat16"):
        check_dtype(torch.device("cuda"), "bfloat16", "encoder.dtype")


def test_a_card_smaller_than_its_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def card(device: object) -> SimpleNamespace:
        return SimpleNamespace(total_memory=4_100_000_000)

    monkeypatch.setattr(torch.cuda, "get_device_properties", card)
    check_memory("cuda", 4, "diffusion.gpu_class")
    check_memory("cuda", 4.2, "diffusion.gpu_class")
    check_memory("cpu", 11, "diffusion.gpu_class")
    with pytest.raises(OperatorError, match=r"11 GB, the GPU here 4.1 GB") as raised:
        check_memory("cuda", 11, "placements.large.gpu_class")
    assert raised.value.param == "placements.large.gpu_class"


@pytest.fixture
def quick_gc() -> Iterator[None]:
    """Memory that runs out is collected for: what the test process has loaded by now is left out of that."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:40],
)
@pytest.mark.usefixtures("quick_gc")
def test_memory_that_runs_out_is_told_as_such_by_whichever_library(error: BaseException) -> None:
    with pytest.raises(OutOfMemory), device_errors("the denoiser"):
        raise error


def test_a_device_that_fails_otherwise_is_lost() -> None:
    with pytest.raises(DeviceLost), device_errors("the denoiser"):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.mark.usefixtures("quick_gc")
def test_what_failed_is_undone_or_the_device_is_lost() -> None:
    """What it had computed is gone by then: that is the memory which going back takes."""
    undone: list[bool] = []

    def fails() -> None:
        loaded = torch.zeros(1)
        held.append(weakref.ref(loaded))
        raise torch.OutOfMemoryError("none left")

    held: list[weakref.ref[torch.Tensor]] = []
    with pytest.raises(torch.OutOfMemoryError), undoing(lambda: undone.append(held[0]() is None), "the VAE"):
        fails()
    assert undone == [True]
    with pytest.raises(DeviceLost, match="the VAE could not be put back"), undoing(fails, "the VAE"):
        fails()


GIB = 2**30


@pytest.mark.parametrize(
    ("num_gpus", "budget", "total", "allowed"),
    [
        (1, None, 11 * GIB, None),
        (0.5, None, 11 * GIB, 0.5),
        (0, 9_900_000_000, 11 * GIB, 9.9 / 11.811),
        (1, 9_900_000_000, 80 * GIB, 9.9 / 85.899),
        (0.5, 4_950_000_000, 11 * GIB, 4.95 / 11.811),
        (0.5, 9_900_000_000, 11 * GIB, 0.5),
        (1, 80_000_000_000, 11 * GIB, None),
    ],
    ids=["all", "half", "planned", "of a larger card", "planned half", "never above the share", "never above the card"],
)
def test_a_process_is_held_to_its_plan_and_to_its_share(
    num_gpus: float, budget: int | None, total: int, allowed: float | None
) -> None:
    assert memory_fraction(num_gpus, budget, total) == (allowed and pytest.approx(allowed, rel=1e-3))


@given(
    shares=st.lists(st.floats(0.05, 1), min_size=1, max_size=8),
    total=st.integers(2 * GIB, 200 * GIB),
    gigabytes=st.floats(1, 200),
)
def test_replicas_whose_shares_fit_a_card_never_fill_it(shares: list[float], total: int, gigabytes: float) -> None:
    """Each with the plan that its share of the class gives it, on any card that passes for one of the class."""
    if sum(shares) > 1 or total < CLASS_SLACK * gigabytes * 1e9:
        return
    held = [memory_fraction(share, int(USABLE * share * gigabytes * 1e9), total) or 1.0 for share in shares]
    assert sum(held) <= USABLE / CLASS_SLACK + 1e-9


def test_segments_grow_unless_the_operator_has_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = torch._C._accelerator_getAllocatorSettings  # type: ignore[attr-defined]
    before = settings()
    for name in ALLOCATOR_VARIABLES:
        with monkeypatch.context() as patched:
            patched.setenv(name, "max_split_size_mb:64")
            grow_segments()
            assert settings() == before
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    grow_segments()
    assert settings() == "expandable_segments:True"


def test_no_card_is_found_for_who_computes_on_none() -> None:
    assert card_here("cpu") is None


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="needs a Linux that has autogroup")
def test_who_stands_back_has_a_session_of_its_own_as_nice_as_its_threads() -> None:
    """Though it leads a group of processes, as Ray's workers do, is not root, and others do so at the same time."""
    script = """
import ctypes, os
from serve.devices import stand_back
if os.getuid() == 0:
    os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: else its files in /proc stay root's
for child in range(3):
    if not os.fork():
        os.setpgid(0, 0)
        stand_back(19)
        os.write(1, f"{os.getsid(0) == os.getpid()} {open('/proc/self/autogroup').read()}".encode())
        os._exit(0)
for child in range(3):
    os.wait()
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert answer.count("nice 19") == 3
    assert answer.count("True /autogroup-") == 3
    assert "nice 19" not in Path("/proc/self/autogroup").read_text(), "who called it is as it was"


def test_a_card_that_tells_no_utilization_tells_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML has errors of its own, such as that of a driver that does not know the question."""

    class NVMLError(Exception):
        pass

    def unknown(card: int) -> int:
        raise NVMLError("Not Supported")

    values = {"is_initialized": True, "device_count": 1, "get_per_process_memory_fraction": 0.5}
    values |= {
        "memory_allocated": 3,
        "max_memory_allocated": 4,
        "get_device_properties": SimpleNamespace(total_memory=10),
    }
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "utilization", unknown)
    assert gpu_usage() == GpuUsage(allocated=3, peak=4, allowed=5, total=10, utilization=None)
