"""The front of the Celery design: orders go to Redis, the client asks for the state until there is a picture.

Started as `uvicorn loadtest.baselines.celery_api:app`, with `CelerySettings` in its environment.
"""

from __future__ import annotations

from typing import Any

import redis
from celery.result import AsyncResult
from fastapi import FastAPI, HTTPException
from fastapi.staticfiles import StaticFiles

from loadtest.baselines import celery_app
from loadtest.baselines.order import RETRY_AFTER, Order

app = FastAPI(title="Celery")
app.mount("/outputs", StaticFiles(directory=celery_app.settings.outputs))
_broker: Any = redis.Redis.from_url(celery_app.settings.redis_url)


@app.post("/generate", status_code=202)
def generate(order: Order) -> dict[str, str]:
    waiting = int(_broker.llen(celery_app.QUEUE))
    if waiting >= celery_app.settings.max_queue_size:
        raise HTTPException(503, "the queue is full", RETRY_AFTER)
    job = celery_app.generate.delay(order.model_dump())
    return {"job_id": job.id, "status": "queued", "message": f"estimated position: {waiting + 1}"}


@app.get("/status/{job_id}")
def status(job_id: str) -> dict[str, Any]:
    """`status` is Celery's: PENDING, RETRY, SUCCESS, FAILURE. With SUCCESS, `result` has the picture's `url`."""
    job = AsyncResult(job_id, app=celery_app.app)
    state = job.state
    told: dict[str, Any] = {"job_id": job_id, "status": state}
    if state == "SUCCESS":
        told["result"] = job.result
    elif state == "FAILURE":
        told["error"] = str(job.result)
    return told
