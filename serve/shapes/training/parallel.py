"""Data-parallel training on CPU cores: one single-threaded process a core, gradients averaged by gloo."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn


def run(workers: int, stage: Callable[..., None], *args: object) -> None:
    """Call ``stage(*args)`` in ``workers`` processes that form one group; with one worker, here and now."""
    if workers == 1:
        threads = torch.get_num_threads()
        _configure()
        try:
            stage(*args)
        finally:  # this process is the caller's, and both are for all of it
            torch.set_num_threads(threads)
            torch.set_flush_denormal(False)
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(_worker, (workers, str(Path(folder) / "store"), stage, args), nprocs=workers)


def rank() -> int:
    """The process's number in its group; 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Processes in the group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(params: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by the group's mean, in one all-reduce over one flat tensor."""
    if world() == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= world()
    for param, mean in zip(params, torch.split(flat, [p.numel() for p in params]), strict=True):
        param.grad = mean.view_as(param)


def barrier() -> None:
    """Wait until every process of the group is here."""
    if world() > 1:
        dist.barrier()


def say(message: str) -> None:
    """Print progress, once for the whole group."""
    if rank() == 0:
        print(message, flush=True)


def _worker(index: int, workers: int, store: str, stage: Callable[..., None], args: tuple[object, ...]) -> None:
    _configure()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=workers)
    try:
        stage(*args)
    finally:
        dist.destroy_process_group()


def _configure() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
