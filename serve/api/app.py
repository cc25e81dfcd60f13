"""The HTTP application. It knows the service and nothing of what carries it: Ray Serve, uvicorn or a test."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from fastapi_offline import FastAPIOffline

from serve import __version__
from serve.api import captions, document, errors, health, imagen, jobs, native, openai, prompts, sdapi, text
from serve.api.arrivals import Arrivals
from serve.api.auth import Doorkeeper
from serve.api.middleware import BodyLimit, RequestIds
from serve.api.parts import Root
from serve.api.streams import Streams
from serve.captions.service import CaptionService
from serve.keys import KeyStore
from serve.service import ImageService
from serve.settings.tree import Settings
from serve.telemetry.tracing import Tracing
from serve.text import TextService


def create_app(
    service: ImageService,
    texts: TextService,
    settings: Settings,
    keys: KeyStore | None = None,
    tracing: Tracing | None = None,
    describing: CaptionService | None = None,
) -> FastAPI:
    """Every dialect on the same services. Without `keys` whoever reaches the server may use it, without `tracing` no
    order is traced, without `describing` no caption is made."""
    app = FastAPIOffline(  # FastAPI whose page at /docs carries its own scripts: it works on a closed network
        redoc_url=None,
        title="Tandem",
        version=__version__,
        description="Text to image: order a job, follow it, fetch its pictures. Or have text encoded.",
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        swagger_ui_parameters={"validatorUrl": None},
    )
    app.state.service = service
    app.state.text = texts
    app.state.captions = describing
    app.state.keys = keys
    app.state.salted_keys = settings.keys.salt
    app.state.salt_header = settings.cache.salt_header
    app.state.limits = settings.limits
    app.state.streams = Streams(settings.http.max_streams)
    app.state.http = settings.http
    app.state.job_timeout_s = settings.jobs.queue_ttl_s + settings.jobs.timeout_s
    errors.install(app)
    document.install(app)
    # The last one added is the outermost.
    http = settings.http
    app.add_middleware(BodyLimit, max_bytes=http.max_body_bytes, max_bodies_bytes=http.max_bodies_bytes)
    app.add_middleware(Doorkeeper)
    app.add_middleware(RequestIds)
    app.add_middleware(Arrivals, tracing=tracing)
    app.include_router(jobs.router)
    app.include_router(native.router)
    app.include_router(openai.router)
    app.include_router(text.router)
    app.include_router(prompts.router)
    app.include_router(captions.router)
    app.include_router(sdapi.router)
    app.include_router(imagen.router)
    app.include_router(health.router)
    app.add_api_route("/", _home, include_in_schema=False)
    return app


async def _home(root: Root) -> RedirectResponse:
    return RedirectResponse(f"{root}/docs")
