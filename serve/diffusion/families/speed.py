"""Speed options of a placement: precision, and compiled denoisers.

Attention is torch's scaled_dot_product_attention in every denoiser that diffusers has: there is nothing to choose.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from serve.devices import check_dtype
from serve.errors import OperatorError
from serve.models.denoiser import best_dtype

if TYPE_CHECKING:
    from serve.diffusion.families.base import Family, Lane

log = logging.getLogger(__name__)

DTYPE = "diffusion.dtype"
COMPILE = "diffusion.compile"
GRAPHS = 256
"""Compiled graphs of one block's code that a replica keeps: one for each batch, size and length of text. Sizes beyond
them run as they are."""


def choose_dtype(device: torch.device, wanted: str, class_dtypes: Sequence[str], family: str) -> torch.dtype:
    """Precision of denoiser and VAE. `wanted` is `diffusion.dtype`; `class_dtypes` the GPU class's, or empty.

    Raises OperatorError naming the setting where the device can't compute in it.
    """
    if wanted != "auto":
        name, setting = wanted, DTYPE
    elif device.type == "cpu":
        return torch.float32
    elif class_dtypes:
        name, setting = best_dtype(family, class_dtypes), "gpu_classes"
    else:
        here = ("bfloat16", "float16") if _has_bfloat16(device) else ("float16",)
        name, setting = best_dtype(family, here), DTYPE
    check_dtype(device, name, setting)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _has_bfloat16(device: torch.device) -> bool:
    try:
        check_dtype(device, "bfloat16", DTYPE)
    except OperatorError:
        return False
    return True


def remember_signatures(denoiser: Any) -> None:
    """diffusers' `Attention.forward` (0.42) asks in each call what arguments its processor takes, 14 us each time, with
    the GIL held; `inspect` is quicker where a function has its answer with it."""
    for processor in getattr(denoiser, "attn_processors", {}).values():
        call: Any = type(processor).__call__
        call.__signature__ = inspect.signature(call)


def compile_family(family: Family) -> None:
    """Compile the denoiser's blocks, and have it see batches of 1, 2, 4, 8, ... lanes only.

    Blocks rather than the whole: those of one kind share their code, so that a new size costs seconds, not minutes, in
    which every image in hand would wait. Shapes are constants to the compiler: the kernels are faster, and buckets keep
    them few. Raises OperatorError where there is no working compiler.
    """
    _try_compiler(family)
    for block in blocks(family.denoiser):
        block.compile(dynamic=False)
    predict = bucketed(family.predict)

    def compiled(lanes: Sequence[Lane]) -> torch.Tensor:
        # Here and not once: a thread that sets torch's limit sets its own alone.
        with torch._dynamo.config.patch(recompile_limit=GRAPHS):
            return predict(lanes)

    family.predict = compiled  # type: ignore[method-assign]
    family.compiled = True


def uncompile(family: Family) -> None:
    """Have a compiled family compute as it was written, in batches that nobody fills up."""
    vars(family).pop("predict", None)
    for block in blocks(family.denoiser):
        block._compiled_call_impl = None
    family.compiled = False


def blocks(denoiser: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated blocks of the denoiser, as diffusers names them, or else the members of its lists of layers."""
    if names := getattr(denoiser, "_repeated_blocks", None):
        found = [module for module in denoiser.modules() if type(module).__name__ in names]
    else:
        lists = [child for child in denoiser.children() if isinstance(child, torch.nn.ModuleList)]
        found = [block for layers in lists for block in layers]
    return found or [denoiser]


Predict = Callable[[Sequence["Lane"]], torch.Tensor]


def bucketed(predict: Predict) -> Predict:
    """The same predictions, of a batch that is filled up to a power of two with its last lane."""

    def filled(lanes: Sequence[Lane]) -> torch.Tensor:
        missing = bucket(len(lanes)) - len(lanes)
        return predict([*lanes, *[lanes[-1]] * missing])[: len(lanes)]

    return filled


def bucket(lanes: int) -> int:
    """The least power of two that is not less."""
    return 1 << (lanes - 1).bit_length()


def _try_compiler(family: Family) -> None:
    trial: Any = torch.compile(torch.nn.functional.gelu, dynamic=False)
    try:
        with torch.inference_mode():
            trial(torch.ones(8, 8, dtype=family.dtype, device=family.device))
    except Exception as error:
        log.debug("torch.compile failed", exc_info=error)
        reason = f"{COMPILE}: does not work here ({type(error).__name__})"
        raise OperatorError(reason, COMPILE) from error
