"""What the rungs of the memory ladder do to a family: at its loading, and later, when memory runs out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from serve.devices import device_errors
from serve.diffusion.attention import slice_attention
from serve.diffusion.families.speed import blocks, uncompile
from serve.diffusion.offload import Offload, compute_on_cpu, layers
from serve.errors import GenerationFailed, OperatorError
from serve.quantize import BITS, quantize
from serve.rungs import MEANS, Means, Rung, worse

if TYPE_CHECKING:
    from serve.diffusion.families.base import Family

log = logging.getLogger(__name__)

LIBRARY = "needs the package bitsandbytes: pip install 'tandem-serve[quantization]'"


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
    except ImportError as error:
        raise OperatorError(f"diffusion.rung: {rung} {LIBRARY}", "diffusion.rung") from error
    except ValueError as error:
        reason = f"{rung} does not work on {family.device.type} here"
        raise OperatorError(f"diffusion.rung: {reason}", "diffusion.rung") from error
    family.denoiser = denoiser
    _switch(family, rung)


def descend(family: Family, to: Rung) -> None:
    """Take a living family down to a worse rung. Images in hand go on: their latents and samplers are left alone.

    Called between two steps, on the thread that makes them. Decoding between steps, tiles and slices are switches.
    Weights are packed in place, layer by layer; those of int8 are packed once more for int4. Where a rung has its
    weights whole again, they are read from the model's folder. Offloading moves them to the machine's memory.

    Raises OutOfMemory or GenerationFailed where that fails: `family.rung` is the old one then, and computes as before
    (some of its layers may have been packed). DeviceLost as any step does.
    """
    if not worse(to, family.rung):
        raise ValueError(f"{to} is not below {family.rung}")
    means, now = MEANS[to], MEANS[family.rung]
    if family.compiled and not compiles(to):
        uncompile(family)
    with device_errors("the denoiser"), torch.inference_mode(False):
        try:
            if not means.on_card:
                _leave_card(family)
            elif (means.weights, means.offload) != (now.weights, now.offload):
                _rearrange(family, means, now)
        except (ImportError, ValueError, OperatorError) as error:
            raise GenerationFailed(f"the denoiser can't go down to {to}: {error}") from error
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
    if means.weights == "plain" != now.weights:
        _replace(family, means)
        return
    _pack(family.denoiser, means, family.device)
    if means.offload == now.offload:
        return
    if family.offload is not None:
        family.offload.close()
    try:
        family.offload = _lay(family.denoiser, means, family.device)
    except BaseException:
        family.offload = _lay(family.denoiser, now, family.device)
        raise


def _replace(family: Family, means: Means) -> None:
    """Weights that were packed are read again, whole."""
    packed, whole = family.denoiser, family.load_denoiser()
    packed.to("cpu")
    try:
        family.offload = _lay(whole, means, family.device)
    except BaseException:
        packed.to(family.device)
        raise
    family.denoiser = whole


def _leave_card(family: Family) -> None:
    """The denoiser and the VAE compute on the CPU from now on; the images' latents stay where they are."""
    if MEANS[family.rung].weights != "plain":
        whole = family.load_denoiser()
    else:
        whole = family.denoiser
        if family.offload is not None:
            family.offload.close()
    family.offload = None
    family.denoiser = compute_on_cpu(whole, family.device, family.dtype)
    family.vae.leave_card()


def _switch(family: Family, rung: Rung) -> None:
    means = MEANS[rung]
    family.rung = rung
    family.vae.tile = min(family.vae.tile, means.tile) if means.on_card else means.tile
    slice_attention(family.denoiser, means.sliced_attention)
