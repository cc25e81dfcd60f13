"""Conditioning -> a safetensors file, under the names of the stock diffusers pipelines' arguments.

Each embedding has the batch dimension of 1 that the pipelines expect: for SD and SD 3, `pipeline(**load_file(path))`
draws the prompt. SDXL's and FLUX's files hold more, for those who call the denoiser directly: `add_time_ids` (of the
refiner `negative_add_time_ids` too) and `text_ids`. Their pipelines make these themselves and take no such argument, so
that they are left out first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import save

from serve.domain.conditioning import Conditioning, Mix, Schedule, TextEmbedding
from serve.errors import InvalidRequest
from serve.settings.room import Dtype

_DTYPES: Mapping[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def conditioning_at(schedule: Schedule, step: int) -> Conditioning:
    """What the denoiser reads in one step of a schedule. Texts are mixed here, in float32 on the CPU.

    Raises InvalidRequest for a composition: a pipeline takes one text.
    """
    phase = schedule.at(step)
    if len(phase.positive) > 1:
        raise InvalidRequest("prompt: AND is several texts at once, and embeddings are of one", "prompt")
    ((_, mix),) = phase.positive
    positive = _mixed(mix, schedule.texts)
    negative = None if phase.negative is None else _mixed(phase.negative, schedule.texts)
    return Conditioning(
        positive=positive.context,
        negative=None if negative is None else negative.context,
        pooled=positive.pooled,
        negative_pooled=None if negative is None else negative.pooled,
        time_ids=schedule.time_ids,
        negative_time_ids=schedule.negative_time_ids,
    )


def _mixed(mix: Mix, texts: Sequence[TextEmbedding]) -> TextEmbedding:
    parts = [(share, texts[index]) for share, index in mix if share != 0]
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    like = texts[mix[0][1]]
    context = torch.zeros_like(like.context)
    pooled = None if like.pooled is None else torch.zeros_like(like.pooled)
    for share, text in parts:
        context.add_(text.context, alpha=share)
        if pooled is not None and text.pooled is not None:
            pooled.add_(text.pooled, alpha=share)
    return TextEmbedding(context, pooled)


def to_safetensors(conditioning: Conditioning, family: str, metadata: Mapping[str, str], dtype: Dtype) -> bytes:
    """The file. Embeddings are in `dtype`; ids stay float32, which bfloat16 could not spell above 256, and masks int64.

    Raises InvalidRequest that names `dtype` where an embedding is too large for it.
    """
    tensors = {}
    for name, tensor in named(conditioning, family).items():
        cast = tensor if name.endswith(("_ids", "_mask")) else tensor.to(_DTYPES[dtype])
        if not torch.isfinite(cast).all() and torch.isfinite(tensor).all():
            raise InvalidRequest(f"dtype {dtype} is too small for the values of {name}", "dtype")
        tensors[name] = cast.contiguous()
    return save(tensors, metadata=dict(metadata))


def shapes(conditioning: Conditioning, family: str) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the file."""
    return {name: tuple(tensor.shape) for name, tensor in named(conditioning, family).items()}


def named(conditioning: Conditioning, family: str) -> dict[str, torch.Tensor]:
    """By name, what the conditioning has: (1, tokens, width), pooled (1, width), `add_time_ids` (1, 6) or (1, 5).

    `text_ids` is (tokens, 3) of zeros: text has no place in FLUX's image, see `FluxPipeline.encode_prompt` in
    https://github.com/huggingface/diffusers/blob/main/src/diffusers/pipelines/flux/pipeline_flux.py. PixArt's sides are
    padded with zeros to one length, which its pipeline asks for, and have a mask, (1, tokens), 0 where they are;
    AuraFlow's come padded, and have a mask too.
    """
    given = {
        "prompt_embeds": conditioning.positive,
        "negative_prompt_embeds": conditioning.negative,
        "pooled_prompt_embeds": conditioning.pooled,
        "negative_pooled_prompt_embeds": conditioning.negative_pooled,
        "add_time_ids": conditioning.time_ids,
        "negative_add_time_ids": conditioning.negative_time_ids,
    }
    tensors = {name: tensor.unsqueeze(0) for name, tensor in given.items() if tensor is not None}
    if family == "flux":
        tensors["text_ids"] = torch.zeros(len(conditioning.positive), 3)
    if family in ("pixart", "auraflow"):
        tensors |= _masked(tensors)
    return tensors


def _masked(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`NAME_embeds` of several lengths as (1, longest, width), and `NAME_attention_mask`."""
    longest = max(tensor.shape[1] for tensor in tensors.values())
    padded = {}
    for name, tensor in tensors.items():
        length = tensor.shape[1]
        padded[name] = torch.nn.functional.pad(tensor, (0, 0, 0, longest - length))
        filled = tensor.any(-1).long()  # no token's embedding is zeros
        padded[name.replace("_embeds", "_attention_mask")] = torch.nn.functional.pad(filled, (0, longest - length))
    return padded
