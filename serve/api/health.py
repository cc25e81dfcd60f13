"""What probes ask: is the process alive, is every pool behind it ready."""

from __future__ import annotations

from fastapi import APIRouter, Response

from serve.api.errors import detail
from serve.api.parts import Service
from serve.api.schemas import Health, PoolView, Readiness

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> Health:
    """This process answers. Nothing else is asked, so that a lost part elsewhere never has it killed."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness, "description": "A pool is not ready"}})
async def readyz(service: Service, response: Response) -> Readiness:
    """Every pool's state; 503 until all are ready."""
    states = await service.readiness()
    pools = {name: PoolView(ready=state.ready, detail=state.detail) for name, state in states.items()}
    waiting = [name for name, pool in pools.items() if not pool.ready]
    if not waiting:
        return Readiness(ready=True, pools=pools)
    response.status_code = 503
    response.headers["Retry-After"] = "1"
    error = detail(503, f"not ready: {', '.join(waiting)}", "not_ready")
    return Readiness(ready=False, pools=pools, error=error)
