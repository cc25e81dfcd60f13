"""A denoiser whose weights lie in the machine's memory, and come to the device as they are needed.

diffusers' group offloading takes the members of a model's lists for groups. A U-Net's are its few large stages, of
which SDXL's two largest are most of the model. So the groups here are the repeated blocks, or single layers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
ALIGNMENT = 256
"""Bytes: where a tensor may begin, so that kernels read it in their widest loads."""
PIECE = 256 * 2**20
"""Bytes of page-locked memory that are taken at once, or less for a smaller model."""


@dataclass(slots=True, eq=False)
class _Slot:
    """Device memory for one group. `ready` is when what it holds has arrived, None on a CPU."""

    buffer: torch.Tensor
    group: _Group | None = None
    ready: torch.cuda.Event | None = None


@dataclass(slots=True, eq=False)
class _Group:
    """Weights that come and go together. `home` is where they lie in the machine's memory, `places` where each begins
    in a slot, in bytes, and `size` what they take there."""

    tensors: Sequence[torch.Tensor]
    home: Sequence[torch.Tensor]
    places: Sequence[int]
    size: int
    slot: _Slot | None = None

    def within(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        return [_view(buffer, place, like) for place, like in zip(self.places, self.tensors, strict=True)]

    def lie(self, where: Sequence[torch.Tensor]) -> None:
        for tensor, data in zip(self.tensors, where, strict=True):
            tensor.data = data


class Offload:
    """Hooks on `modules`, each of which finds its weights on `device` when it is called.

    The device holds one slot, of the largest group's size, or with `ahead` two: while a group computes, the next one's
    weights are copied, on a GPU in a stream of their own. Which one is next is what came next the last time. Slots are
    used over and over, so that the device never holds more. What is in no group lies on the device. One thread calls
    the denoiser.

    Owns: the groups' copies in the machine's memory (page-locked where the device is a GPU), the slots, the hooks.
    """

    def __init__(
        self, denoiser: nn.Module, modules: Sequence[nn.Module], device: torch.device, *, ahead: bool = False
    ) -> None:
        """The weights may lie anywhere; never more than one layer's are in the machine's memory twice."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        self._after: dict[_Group, _Group] = {}
        self._last: _Group | None = None
        owned = _owned(modules)
        host = _Host(device, sum(_room(tensor) for _, tensors in owned for tensor in tensors))
        groups = [(module, _group(tensors, host)) for module, tensors in owned]
        _stay(denoiser, device, {id(tensor) for _, group in groups for tensor in group.tensors})
        most = max((group.size for _, group in groups), default=0)
        size = {"size": (most,), "dtype": torch.uint8, "device": device}
        self._slots = [_Slot(torch.empty(**size)) for _ in range(2 if ahead else 1)]  # type: ignore[call-overload]
        self._hooks = [
            module.register_forward_pre_hook(lambda *_, group=group: self._enter(group)) for module, group in groups
        ]

    @property
    def slot_bytes(self) -> int:
        """What the groups take of the device."""
        return sum(slot.buffer.numel() for slot in self._slots)

    def close(self) -> None:
        """Take the hooks away and give the slots back; the weights lie in the machine's memory."""
        if self._stream is not None:
            torch.cuda.synchronize(self._device)
        for hook in self._hooks:
            hook.remove()
        for slot in self._slots:
            _empty(slot)
        self._slots = []
        self._after.clear()

    def _enter(self, group: _Group) -> None:
        """Before the group computes. What computed before it is queued by now, so that its slot may be written to
        once that is done."""
        last, self._last = self._last, group
        with torch.inference_mode(False), torch.no_grad():
            if last is not None:
                self._after[last] = group
            if group.slot is None:
                self._fetch(group, None if last is None else last.slot)
            assert group.slot is not None, "it was fetched"
            if group.slot.ready is not None:
                torch.cuda.current_stream(self._device).wait_event(group.slot.ready)
            following = self._after.get(group)
            if len(self._slots) > 1 and following is not None and following.slot is None:
                self._fetch(following, group.slot)

    def _fetch(self, group: _Group, computing: _Slot | None) -> None:
        """Copy a group into a slot, another than the one that computes where there are two."""
        slot = next((each for each in self._slots if each is not computing), self._slots[0])
        _empty(slot)
        there = group.within(slot.buffer)
        if self._stream is None:
            _copy(group.home, there)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                _copy(group.home, there)
                slot.ready = self._stream.record_event()
        group.lie(there)
        group.slot, slot.group = slot, group


def to_cpu(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Move a denoiser of that precision to the CPU, into the one that it is computed in there."""
    nn.Module.to(denoiser, CPU, _precision(dtype))


def bridge(denoiser: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Have a denoiser that `to_cpu` has moved read and give tensors as it did before: on `device`, in `dtype`. What has
    another dtype keeps it: a timestep is float32 whatever the weights are, and rounded it would be another one."""
    precision = _precision(dtype)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return _moved(args, CPU, dtype, precision), _moved(kwargs, CPU, dtype, precision)

    def leave(_: nn.Module, __: Any, output: Any) -> Any:
        return _moved(output, device, precision, dtype)

    denoiser.register_forward_pre_hook(enter, with_kwargs=True)
    denoiser.register_forward_hook(leave)


def _precision(dtype: torch.dtype) -> torch.dtype:
    """On a CPU, which is slow in float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def _moved(value: Any, device: torch.device, dtype: torch.dtype, into: torch.dtype) -> Any:
    """The same structure, its tensors on the device, those of `dtype` in the other one."""
    if isinstance(value, torch.Tensor):
        return value.to(device, into if value.dtype == dtype else None)
    if isinstance(value, tuple | list):
        return type(value)(_moved(each, device, dtype, into) for each in value)
    if isinstance(value, Mapping):
        return {key: _moved(each, device, dtype, into) for key, each in value.items()}
    return value


def layers(denoiser: nn.Module) -> list[nn.Module]:
    """Modules with weights that are called themselves: those that have no others inside."""
    return [module for module in denoiser.modules() if not list(module.children()) and list(_tensors(module))]


def _owned(modules: Sequence[nn.Module]) -> list[tuple[nn.Module, list[torch.Tensor]]]:
    """Modules with the weights that are theirs alone: what two of them share may not go with one."""
    counts = Counter(id(tensor) for module in modules for tensor in _tensors(module))
    owned = [(module, [each for each in _tensors(module) if counts[id(each)] == 1]) for module in modules]
    return [(module, tensors) for module, tensors in owned if tensors]


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _group(tensors: Sequence[torch.Tensor], host: _Host) -> _Group:
    """Have the tensors lie in the machine's memory, and know where they go in a slot."""
    places, end = [], 0
    for tensor in tensors:
        tensor.data = host.keep(tensor.data)
        places.append(end)
        end += _room(tensor)
    return _Group(tensors, [tensor.data for tensor in tensors], places, end)


class _Host:
    """Memory of the machine for `room` bytes of weights. For a GPU it is page-locked: that is what copies are read from
    while the CPU goes on. torch's allocator gives such memory in powers of two, so it is taken in pieces that are ones,
    which weights share. Where it can't be had, other memory does.
    """

    def __init__(self, device: torch.device, room: int) -> None:
        self._locked = device.type == "cuda"
        self._left = room
        self._piece = torch.empty(0, dtype=torch.uint8)

    def keep(self, data: torch.Tensor) -> torch.Tensor:
        """The data here, or as it is where it lies well already."""
        data = _dense(data)
        if data.device.type == "cpu" and (not self._locked or data.is_pinned()):
            return data
        room = _room(data)
        if self._piece.numel() < room:
            self._piece = self._taken(max(room, min(PIECE, self._left)))
        kept = _view(self._piece, 0, data)
        self._piece, self._left = self._piece[room:], self._left - room
        return kept.copy_(data)

    def _taken(self, size: int) -> torch.Tensor:
        if self._locked:
            try:
                return torch.empty(1 << (size - 1).bit_length(), dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._locked = False
                log.warning("no page-locked memory for offloaded weights, which are slower to copy: %s", error)
        return torch.empty(size, dtype=torch.uint8)


def _copy(tensors: Sequence[torch.Tensor], to: Sequence[torch.Tensor]) -> None:
    for source, target in zip(tensors, to, strict=True):
        target.copy_(source, non_blocking=target.device.type == "cuda")


def _room(tensor: torch.Tensor) -> int:
    """Bytes that it takes, to where the next one may begin."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def _dense(data: torch.Tensor) -> torch.Tensor:
    """Without gaps, in its own memory format."""
    dense = data.is_contiguous() or (data.dim() == 4 and data.is_contiguous(memory_format=torch.channels_last))
    return data if dense else data.contiguous()


def _view(buffer: torch.Tensor, place: int, like: torch.Tensor) -> torch.Tensor:
    length = like.numel() * like.element_size()
    return buffer[place : place + length].view(like.dtype).as_strided(like.shape, like.stride())


def _empty(slot: _Slot) -> None:
    group, slot.group = slot.group, None
    if group is not None:
        group.lie(group.home)
        group.slot = None


def _stay(denoiser: nn.Module, device: torch.device, offloaded: set[int]) -> None:
    for tensor in _tensors(denoiser):
        if id(tensor) not in offloaded:
            tensor.data = tensor.data.to(device)
