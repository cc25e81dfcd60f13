"""What the rungs of the memory ladder do to a family: at its loading, and later, when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from serve.devices import device_errors, undoing
from serve.diffusion.attention import slice_attention
from serve.diffusion.families.speed import blocks, uncompile
from serve.diffusion.ladder import RUNG_SETTING
from serve.diffusion.offload import Offload, bridge, layers, to_cpu
from serve.errors import GenerationFailed, OperatorError
from serve.quantize import BITS, load_library, packed, quantize
from serve.rungs import MEANS, Means, Rung, worse

if TYPE_CHECKING:
    from serve.diffusion.families.base import Family

log = logging.getLogger(__name__)

LIBRARY = "needs the package bitsandbytes: pip install 'tandem-serve[quantization]'"


def check_library(rung: Rung) -> None:
    """Before gigabytes are read for it: raises OperatorError naming `diffusion.rung` where what packs the rung's
    weights is not installed."""
    if MEANS[rung].weights == "plain":
        return
    try:
        load_library()
    except ImportError as error:
        raise OperatorError(f"{RUNG_SETTING}: {rung} {LIBRARY}", RUNG_SETTING) from error


def settle(family: Family, denoiser: Any, rung: Rung) -> None:
    """Give a family that is being opened its denoiser, which lies on the CPU, as the rung has it. The device never
    holds more than one layer's weights beside what the rung leaves there.

    Raises OperatorError naming `diffusion.rung`, OutOfMemory, GenerationFailed.
    """
    means = MEANS[rung]
    try:
        with device_errors("the denoiser"), torch.inference_mode(False):
            _pack(denoiser, means, family.device)
            family.offload = _lay(denoiser, means, family.device)
    except ValueError as error:
        reason = f"{rung} does not work on {family.device.type} here"
        raise OperatorError(f"{RUNG_SETTING}: {reason}", RUNG_SETTING) from error
    family.denoiser, family.packed = denoiser, packed(denoiser)
    _switch(family, rung)


def descend(family: Family, to: Rung) -> None:
    """Take a living family down to a worse rung. Images in hand go on: their latents and samplers are left alone.

    Called between two steps, on the thread that makes them. Decoding between steps, tiles and slices are switches.
    Weights are packed in place, layer by layer; those of int8 are packed once more for int4. Where a rung has its
    weights whole again, they are read from the model's folder. Offloading moves them to the machine's memory.

    Raises OutOfMemory or GenerationFailed where that fails: `family.rung` is the old one then, and computes as before
    (some of its layers may have been packed: `family.packed`). Raises DeviceLost as any step does, and where the family
    could not be put back as it was.
    """
    if not worse(to, family.rung):
        raise ValueError(f"{to} is not below {family.rung}")
    means, now = MEANS[to], MEANS[family.rung]
    if family.compiled and not compiles(to):
        uncompile(family)
    with device_errors("the denoiser"), torch.inference_mode(False):
        try:
            if not means.on_card:
                with _reversible(family):
                    _leave_card(family)
            elif (means.weights, means.offload) != (now.weights, now.offload):
                _rearrange(family, means, now)
        except (ImportError, ValueError, OperatorError) as error:
            raise GenerationFailed(f"the denoiser can't go down to {to}: {error}") from error
        finally:
            family.packed = packed(family.denoiser)
    if family.device.type == "cuda":
        torch.cuda.empty_cache()  # whole blocks, of what the rung before has left in pieces
    log.warning("model %s goes down from %s to %s", family.model.name, family.rung, to)
    _switch(family, to)


def compiles(rung: Rung) -> bool:
    """Whether `diffusion.compile` has an effect on the rung. Where weights come and go, are unpacked for each product,
    or attention is cut up, the compiler would break its graphs at every layer, and compile them anew on the way down.
    """
    means = MEANS[rung]
    return means.weights == "plain" and means.offload == "none" and not means.sliced_attention


def _pack(denoiser: Any, means: Means, device: torch.device) -> None:
    if means.weights != "plain":
        quantize(blocks(denoiser), BITS[means.weights], device)


def _lay(denoiser: Any, means: Means, device: torch.device) -> Offload | None:
    """The weights where the rung has them: on the device, or what of them is called on its way there."""
    if means.offload == "none":
        denoiser.to(device)
        return None
    if means.offload == "group":
        return Offload(denoiser, blocks(denoiser), device, ahead=True)
    return Offload(denoiser, layers(denoiser), device)


def _rearrange(family: Family, means: Means, now: Means) -> None:
    """Other weights, or the same elsewhere. Whatever goes wrong, the family computes afterwards as it did."""
    if means.weights == "plain" and packed(family.denoiser):
        with _reversible(family):
            _replace(family, means)
        return
    _pack(family.denoiser, means, family.device)
    if means.offload != now.offload:
        with _reversible(family):
            _close(family)
            family.offload = _lay(family.denoiser, means, family.device)


def _replace(family: Family, means: Means) -> None:
    """Weights that were packed are read again, whole."""
    whole = family.load_denoiser()
    family.denoiser.to("cpu")
    family.offload = _lay(whole, means, family.device)
    family.denoiser = whole


def _leave_card(family: Family) -> None:
    """The denoiser and the VAE compute on the CPU from now on; the images' latents stay where they are."""
    whole = family.load_denoiser() if packed(family.denoiser) else family.denoiser
    _close(family)
    to_cpu(whole, family.dtype)
    family.vae.leave_card()
    bridge(whole, family.device, family.dtype)  # once nothing can fail any more: it is not taken back
    family.denoiser = whole


def _close(family: Family) -> None:
    if family.offload is not None:
        family.offload.close()
        family.offload = None


def _reversible(family: Family) -> AbstractContextManager[None]:
    """What fails inside leaves the denoiser's weights as they were, where the rung has them."""
    denoiser, now = family.denoiser, MEANS[family.rung]
    before = {name: tensor.dtype for name, tensor in _named(denoiser)}

    def undo() -> None:
        for name, tensor in _named(denoiser):
            tensor.data = tensor.data.to(before[name])  # exact: a precision is only ever left for a wider one
        _close(family)
        family.offload = _lay(denoiser, now, family.device)

    return undoing(undo, "the denoiser")


def _named(denoiser: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from denoiser.named_parameters()
    yield from denoiser.named_buffers()


def _switch(family: Family, rung: Rung) -> None:
    means = MEANS[rung]
    family.rung = rung
    family.vae.tile = min(family.vae.tile, means.tile) if means.on_card else means.tile
    slice_attention(family.denoiser, means.sliced_attention)
