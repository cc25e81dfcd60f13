"""The rest of the native dialect, `/v1`: images, models, the fleet, the caller's limits, the benchmark."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Header, Path, Response
from fastapi.responses import RedirectResponse

from serve.api import ratelimits
from serve.api.auth import Administers, Generates, Uses
from serve.api.errors import documented
from serve.api.fleet_schemas import FleetView, PlacementView
from serve.api.job_schemas import LimitsView
from serve.api.model_schemas import BenchmarkOrder, BenchmarkReport, ConceptView, ModelList, ModelView
from serve.api.parts import GUARDED, ImageName, JobId, Service, Text
from serve.errors import ModelNotFound
from serve.results.keys import CONTENT_TYPES
from serve.service import ImageService
from serve.telemetry.logs import escape
from serve.text import TextService

router = APIRouter(prefix="/v1", tags=["native"], responses=documented(401, 403, 503), dependencies=GUARDED)

_LONGEST_NAME = 256
ModelName = Annotated[str, Path(alias="id", max_length=_LONGEST_NAME)]
_FILE = {"schema": {"type": "string", "format": "binary"}}


@router.get(
    "/images/{id}/{index}",
    response_class=Response,
    responses=documented(404)
    | {
        200: {"description": "The image", "content": dict.fromkeys(CONTENT_TYPES.values(), _FILE)},
        304: {"description": "The client's copy is the image"},
        307: {"description": "The image is at the URL in `Location` for a while"},
    },
)
async def get_image(
    job_id: JobId,
    name: ImageName,
    service: Service,
    caller: Generates,
    if_none_match: Annotated[str, Header(description="The `ETag` of a copy.")] = "",
) -> Response:
    """One image of a finished job by its index; `image` and `mask` are what the job starts from."""
    image = await service.image(job_id, name, caller)
    if image.url is not None:
        return RedirectResponse(image.url, headers={"Cache-Control": "no-store"})
    data = image.data or b""
    etag = f'"{hashlib.blake2b(data, digest_size=16).hexdigest()}"'
    # Asked for again each time: an id of the client's own may come to stand for another job, and rights end.
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if any(tag.strip().removeprefix("W/") in (etag, "*") for tag in if_none_match.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=image.content_type, headers=headers | {"X-Content-Type-Options": "nosniff"})


@router.get("/models")
async def list_models(service: Service, texts: Text, caller: Uses) -> ModelList:
    """The models that this server draws with, then those whose text alone it encodes."""
    return ModelList(data=tuple((await _models(service, texts)).values()))


@router.get("/models/{id:path}", responses=documented(404))
async def get_model(model: ModelName, service: Service, texts: Text, caller: Uses) -> ModelView:
    """One of them."""
    models = await _models(service, texts)
    if model not in models:
        raise ModelNotFound(f"model {escape(model)[:_LONGEST_NAME]!r} is not served here", "model")
    return models[model]


async def _models(service: ImageService, texts: TextService) -> dict[str, ModelView]:
    known = {
        name: tuple(ConceptView(name=each.name, vectors=dict(each.vectors), fault=each.fault) for each in found)
        for name, found in (await texts.concepts()).items()
    }
    drawn = {
        info.id: ModelView(images=True, concepts=known.get(info.id, ()), **asdict(info)) for info in service.models()
    }
    others = {
        name: ModelView(id=name, created=folder.created, family=folder.family, images=False, concepts=known[name])
        for name, folder in texts.models().items()
    }
    return {name: (others | drawn)[name] for name in {**drawn, **others}}


@router.get("/fleet")
async def get_fleet(service: Service, caller: Uses) -> FleetView:
    """Where each model is drawn: what its placements were planned to hold, and how their replicas do."""
    return FleetView(data=tuple(map(PlacementView.of, await service.fleet())))


@router.get("/limits")
async def get_limits(service: Service, caller: Uses, response: Response) -> LimitsView:
    """What is left of your allowance now. Asking costs nothing of it."""
    limits = await service.limits(caller)
    response.headers.update(ratelimits.headers(limits))
    return LimitsView.of(caller, limits)


@router.post("/benchmark", responses=documented(400, 404, 413, 415, 422, 429))
async def benchmark(order: BenchmarkOrder, service: Service, caller: Administers) -> BenchmarkReport:
    """Time synthetic steps, one at a time. Jobs go on meanwhile, slower. Only where `http.benchmark` offers it."""
    found = await service.benchmark(order.model, order.width, order.height, order.num_inference_steps)
    return BenchmarkReport(**{name: getattr(found, name) for name in BenchmarkReport.model_fields})
