"""Text in the native dialect: embeddings for those who run their own diffusion, and the cache that they come from."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from serve.api.auth import Administers, Embeds
from serve.api.errors import documented
from serve.api.parts import GUARDED, Text
from serve.api.text_schemas import CacheView, Cleared, EmbeddingOrder, EmbeddingReport
from serve.encoders.export import shapes, to_safetensors
from serve.text import Embedded, NewText

router = APIRouter(prefix="/v1", tags=["text"], responses=documented(401, 403, 503), dependencies=GUARDED)

_FILE: dict[str, Any] = {
    "description": "The embeddings, or with `output: report` what is said of them",
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    "headers": {
        "x-tandem-cache": {
            "description": "Where the units of text came from: `memory=0, redis=2, encoded=1`",
            "schema": {"type": "string"},
        }
    },
    "model": EmbeddingReport,
}


@router.post("/embeddings", response_model=None, responses=documented(400, 404, 413, 415, 422) | {200: _FILE})
async def create_embeddings(order: EmbeddingOrder, texts: Text, caller: Embeds) -> Response:
    """Encode a prompt as the model's own pipeline would. The answer is a safetensors file.

    Its tensors have the names of the stock diffusers pipelines' arguments and their batch dimension; its metadata tells
    `model`, `family`, and as JSON `tokens`, `truncated`, `notes` and `cache`.
    """
    embedded = await texts.embed(
        NewText(**order.model_dump(exclude={"dtype", "output"}, by_alias=True), salt=caller.salt)
    )
    cache = ", ".join(f"{tier}={units}" for tier, units in asdict(embedded.cache).items())
    headers = {"x-tandem-cache": cache}
    if order.output == "report":
        told = EmbeddingReport.of(embedded, shapes(embedded.conditioning, embedded.family))
        return JSONResponse(told.model_dump(mode="json"), headers=headers)
    data = await asyncio.to_thread(
        to_safetensors, embedded.conditioning, embedded.family, _metadata(embedded), order.dtype
    )
    headers["Content-Disposition"] = 'attachment; filename="embeddings.safetensors"'
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.get("/cache")
async def get_cache(texts: Text, caller: Administers) -> CacheView:
    """The embeddings that are kept: in Redis, and in the memory of every process."""
    return CacheView.of(await texts.cache())


@router.delete("/cache")
async def clear_cache(texts: Text, caller: Administers) -> Cleared:
    """Remove every embedding. Processes empty their memory within a few seconds; no request fails meanwhile."""
    return Cleared(removed=await texts.clear())


def _metadata(embedded: Embedded) -> dict[str, str]:
    """A safetensors file holds strings only."""
    return {
        "model": embedded.model,
        "family": embedded.family,
        "tokens": json.dumps([asdict(count) for count in embedded.tokens]),
        "truncated": json.dumps([asdict(cut) for cut in embedded.truncated]),
        "notes": json.dumps([asdict(note) for note in embedded.notes]),
        "cache": json.dumps(asdict(embedded.cache)),
    }
