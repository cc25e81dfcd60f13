"""A1111's dialect: what there is to choose from, and the little that there is to say of the machine."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import psutil
from fastapi import APIRouter

from serve.api.auth import Uses
from serve.api.parts import Service, Text
from serve.api.sdapi_list_schemas import (
    A1111Embedding,
    A1111Embeddings,
    A1111Memory,
    A1111Model,
    A1111Sampler,
    A1111Scheduler,
    A1111Scripts,
    A1111Style,
    A1111Upscaler,
)
from serve.encoders.concepts import ConceptInfo
from serve.jobs.terms import CardUse
from serve.models.a1111 import labelled, schedules
from serve.service import ImageService

UPSCALER = A1111Upscaler(name="Lanczos", scale=4.0)

router = APIRouter()
"""Part of `serve.api.sdapi.router`, which asks for the key."""


@router.get("/sdapi/v1/sd-models")
async def a1111_models(service: Service, caller: Uses) -> tuple[A1111Model, ...]:
    """The models that this server draws with."""
    names = (info.id for info in service.models())
    return tuple(A1111Model(title=name, model_name=name, filename=name) for name in names)


@router.get("/sdapi/v1/samplers")
async def a1111_samplers(service: Service, caller: Uses) -> tuple[A1111Sampler, ...]:
    """The samplers of all models together; a model that lacks one refuses it by name."""
    return tuple(
        A1111Sampler(
            name=each.label,
            aliases=each.aliases,
            options=({"scheduler": each.schedule.lower()} if each.schedule else {})
            | ({"second_order": "True"} if each.second_order else {}),
        )
        for each in labelled(_samplers(service))
    )


@router.get("/sdapi/v1/schedulers")
async def a1111_schedulers(service: Service, caller: Uses) -> tuple[A1111Scheduler, ...]:
    """The schedule types of all models together."""
    return tuple(A1111Scheduler(name=label.lower(), label=label) for label in schedules(_samplers(service)))


@router.get("/sdapi/v1/upscalers")
async def a1111_upscalers(caller: Uses) -> tuple[A1111Upscaler, ...]:
    """The one that there is."""
    return (UPSCALER,)


@router.get("/sdapi/v1/prompt-styles")
async def a1111_styles(service: Service, caller: Uses) -> tuple[A1111Style, ...]:
    """The server's templates, as far as they need nothing but a prompt."""
    found = service.styles().values()
    return tuple(A1111Style(name=each.name, prompt=each.prompt, negative_prompt=each.negative_prompt) for each in found)


@router.get("/sdapi/v1/embeddings")
async def a1111_embeddings(service: Service, texts: Text, caller: Uses) -> A1111Embeddings:
    """The learned concepts, as the model stands to them that the caller has set, or the first."""
    chosen = (await service.options(caller)).sd_model_checkpoint
    known = await texts.concepts()
    of_model = known.get(chosen or next((info.id for info in service.models()), ""), ())
    return A1111Embeddings(
        loaded={each.name: _embedding(each) for each in of_model if each.fault is None},
        skipped={each.name: _embedding(each) for each in of_model if each.fault is not None},
    )


@router.get("/sdapi/v1/scripts")
async def a1111_scripts(caller: Uses) -> A1111Scripts:
    """None: what A1111's scripts do is not done here."""
    return A1111Scripts()


@router.get("/sdapi/v1/memory")
async def a1111_memory(service: Service, caller: Uses) -> A1111Memory:
    """Memory in bytes. `GET /v1/fleet` has it by replica."""
    ram = psutil.virtual_memory()
    places = await service.fleet()
    cards = [each.card for place in places for each in place.replicas if each.card is not None]
    return A1111Memory(
        ram={"free": ram.available, "used": ram.total - ram.available, "total": ram.total},
        cuda=_cuda(cards) if cards else {"error": "unavailable"},
    )


@router.get("/sdapi/v1/cmd-flags")
async def a1111_cmd_flags(caller: Uses) -> dict[str, bool]:
    """How A1111 would have been started to be most like this server."""
    return {"api": True, "nowebui": True}


@router.get("/sdapi/v1/latent-upscale-modes", name="a1111_latent_upscale_modes")
@router.get("/sdapi/v1/loras", name="a1111_loras")
@router.get("/sdapi/v1/sd-vae", name="a1111_vaes")
@router.get("/sdapi/v1/hypernetworks", name="a1111_hypernetworks")
@router.get("/sdapi/v1/face-restorers", name="a1111_face_restorers")
@router.get("/sdapi/v1/realesrgan-models", name="a1111_realesrgan_models")
@router.get("/sdapi/v1/script-info", name="a1111_script_info")
@router.get("/sdapi/v1/extensions", name="a1111_extensions")
async def a1111_none(caller: Uses) -> list[dict[str, Any]]:
    """Empty: this server has none of these."""
    return []


@router.post("/sdapi/v1/refresh-checkpoints", name="a1111_refresh_checkpoints")
@router.post("/sdapi/v1/refresh-vae", name="a1111_refresh_vae")
@router.post("/sdapi/v1/refresh-loras", name="a1111_refresh_loras")
async def a1111_refresh(caller: Uses) -> dict[str, Any]:
    """Nothing to do: the lists are what the server was started with, and concepts are looked for by themselves."""
    return {}


def _samplers(service: ImageService) -> tuple[str, ...]:
    """By our names, those of all models."""
    return tuple(dict.fromkeys(chain.from_iterable(info.schedulers for info in service.models())))


def _embedding(info: ConceptInfo) -> A1111Embedding:
    role = next(iter(info.vectors), "")
    return A1111Embedding(shape=info.widths.get(role, 0), vectors=info.vectors.get(role, 0))


def _cuda(cards: Iterable[CardUse]) -> dict[str, Any]:
    """What A1111 tells of its one card, of all of them together."""
    cards = tuple(cards)
    total, used, peak = (sum(getattr(card, name) for card in cards) for name in ("allowed", "used", "peak"))
    return {
        "system": {"free": total - used, "used": used, "total": total},
        "allocated": {"current": used, "peak": peak},
    }
