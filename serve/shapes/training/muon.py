"""Muon: momentum whose update is orthogonalised, for the matrices inside a network (Jordan et al. 2024)."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that drives singular values towards 1 (Jordan 2024)."""


class Muon:
    """Owns: one momentum buffer per group of equally shaped matrices.

    Convolution kernels count as matrices (out, in * k * k). Matrices of one shape are orthogonalised together in one
    batched product, which on a CPU is most of the cost.
    """

    def __init__(self, params: Iterable[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        groups: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for param in params:
            groups[param.shape[0], param[0].numel()].append(param)
        self.groups = dict(groups)
        self.buffers = {shape: torch.zeros(len(members), *shape) for shape, members in self.groups.items()}
        self.momentum = momentum
        self.weight_decay = weight_decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One Nesterov step; every update has spectral norm near ``lr * sqrt(max(1, rows / columns))``."""
        for (rows, columns), members in self.groups.items():
            grads = torch.stack([_grad(p).reshape(rows, columns) for p in members])
            buffer = self.buffers[rows, columns]
            buffer.lerp_(grads, 1 - self.momentum)
            update = orthogonalize(grads.lerp(buffer, self.momentum)) * max(1.0, rows / columns) ** 0.5
            for param, delta in zip(members, update, strict=True):
                param.mul_(1 - lr * self.weight_decay).add_(delta.reshape(param.shape), alpha=-lr)

    def state(self) -> list[Tensor]:
        """The momentum buffers, for a checkpoint."""
        return list(self.buffers.values())

    def load_state(self, buffers: list[Tensor]) -> None:
        """Take up the buffers of a checkpoint."""
        for mine, saved in zip(self.buffers.values(), buffers, strict=True):
            mine.copy_(saved)


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest orthogonal matrices, roughly, of a batch (n, rows, columns), by Newton-Schulz in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    wide: Tensor = matrices.mT.contiguous() if tall else matrices
    x = (wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(matrices.dtype)
    return torch.as_tensor(x.mT if tall else x)


def wants_muon(name: str, param: nn.Parameter) -> bool:
    """Whether a parameter is a hidden matrix; first and last convolutions, norms and biases stay with AdamW."""
    at_the_ends = name.endswith(("conv_in.weight", "conv_out.weight"))
    return param.ndim in (2, 4) and not at_the_ends and min(param.shape[0], param[0].numel()) >= 16


def _grad(param: nn.Parameter) -> Tensor:
    return torch.zeros_like(param) if param.grad is None else param.grad
