"""Serve handles as plain interfaces. Ray's exception wrappers end here."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve.domain import EncodeUnit
from serve.encoders.cache import Fetched
from serve.errors import BackendUnavailable, GenerationFailed, TandemError
from serve.service import PoolState

CALL_S = 10.0


class EncoderClient:
    """The text-encoder pool as a function of units."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def encode(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
        """Embeddings in the order of `units`.

        Raises BackendUnavailable when the pool can't answer, GenerationFailed when it broke on these units.
        """
        result: list[Fetched] = await _call(self._handle.encode, list(units), pool="text-encoder")
        return result

    async def ready(self) -> PoolState:
        return PoolState(True, await _call(self._handle.describe, pool="text-encoder"))


class DiffusionClient:
    """The diffusion pool, as far as the ingress speaks with it: jobs reach it through the store."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def ready(self) -> PoolState:
        return PoolState(True, await _call(self._handle.describe, pool="diffusion"))


async def _call(method: Any, *args: Any, pool: str) -> Any:
    """A pool without replicas answers nothing at all: no call waits longer than CALL_S."""
    try:
        async with asyncio.timeout(CALL_S):
            return await method.remote(*args)
    except RayTaskError as error:
        if isinstance(error.cause, TandemError):
            raise error.cause from None
        raise GenerationFailed(f"the {pool} pool failed on this request") from error
    except (TimeoutError, RayError, BackPressureError, DeploymentUnavailableError) as error:
        raise BackendUnavailable(f"the {pool} pool does not answer", None, 1.0) from error
