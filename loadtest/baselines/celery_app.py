"""The worker of the Celery design: one picture at a time, written into a folder.

Started as `celery --app loadtest.baselines.celery_app worker --pool solo`, with `CelerySettings` in its environment.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.signals import worker_init
from pydantic_settings import BaseSettings, SettingsConfigDict

from loadtest.baselines.order import MAX_WAITING, Order

if TYPE_CHECKING:
    from loadtest.baselines.common import Drawer

QUEUE = "generation"


class CelerySettings(BaseSettings):
    """What API and worker read of their environment: `IMAGEN_REDIS_URL` and so on. The pictures lie in `outputs`."""

    model_config = SettingsConfigDict(env_prefix="imagen_")

    redis_url: str = "redis://127.0.0.1:6379/0"
    outputs: Path = Path("outputs")
    model: str = "shapes"
    torch_threads: int | None = None
    max_queue_size: int = MAX_WAITING


settings = CelerySettings()
app = Celery("imagen", broker=settings.redis_url, backend=settings.redis_url)
app.conf.update(
    task_default_queue=QUEUE,
    worker_prefetch_multiplier=1,
    result_expires=3600,
    broker_connection_retry_on_startup=True,
)


@app.task(name="generate", bind=True, autoretry_for=(MemoryError,), max_retries=3, default_retry_delay=10)  # type: ignore[untyped-decorator]
def generate(self: Any, order: Mapping[str, Any]) -> dict[str, str]:
    """`order` is an Order as JSON has it. The result says where the picture is."""
    from loadtest.baselines.common import png

    file = f"{self.request.id}.png"
    data = png(_drawer().draw([Order.model_validate(order)])[0])
    (settings.outputs / file).write_bytes(data)
    return {"status": "success", "filename": file, "url": f"/outputs/{file}"}


@worker_init.connect  # type: ignore[untyped-decorator]
def _load(**_: Any) -> None:
    _drawer()


@functools.cache
def _drawer() -> Drawer:
    from loadtest.baselines.common import Drawer  # not at the top: the API has no use for torch

    return Drawer(settings.model, settings.torch_threads)
