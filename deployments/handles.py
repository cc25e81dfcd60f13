"""Serve handles as plain interfaces. Ray's exception wrappers end here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatus, DeploymentStatusOverview, ServeStatus

from serve.captions.messages import Ask, Caption
from serve.domain.text import EncodeUnit, Tier
from serve.encoders.cache import Fetched
from serve.encoders.registry import Encoder
from serve.errors import BackendUnavailable, GenerationFailed, TandemError
from serve.placements import Fleet
from serve.readiness import PoolState
from serve.settings.pools import CaptionSettings

CALL_S = 10.0
BENCHMARK_S = 300.0
T = TypeVar("T")


class Controller:
    """What Serve's controller knows of the deployments. It is asked once at a time, by whoever asks: one that hangs
    holds one thread, however often it is probed.

    Owns: that thread.
    """

    def __init__(self, ask: Callable[[], ServeStatus] = serve.status) -> None:
        self._ask = ask
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="controller")
        self._asked: Future[ServeStatus] | None = None

    async def overview(self, application: str, deployment: str) -> DeploymentStatusOverview | None:
        """None where there is no controller, or nothing of that name."""
        if self._asked is None or self._asked.done():
            self._asked = self._thread.submit(self._ask)
        try:
            # Shielded: a probe that gives up must not take the answer from the others.
            status = await asyncio.shield(asyncio.wrap_future(self._asked))
            return status.applications[application].deployments[deployment]
        except (RayError, KeyError):
            return None

    async def awake(self, handle: DeploymentHandle) -> PoolState:
        """Of a pool that may sleep, which being asked itself would keep awake."""
        overview = await self.overview(handle.app_name, handle.deployment_name)
        if overview is None or overview.status in (DeploymentStatus.UNHEALTHY, DeploymentStatus.DEPLOY_FAILED):
            return PoolState(False, "its replicas don't start")
        awake = overview.replica_states.get("RUNNING", 0)
        return PoolState(True, f"{awake} awake" if awake else "asleep")

    async def sleeps(self, handle: DeploymentHandle) -> bool:
        """Whether it is known that no replica is awake."""
        overview = await self.overview(handle.app_name, handle.deployment_name)
        return overview is not None and not overview.replica_states.get("RUNNING", 0)


class EncoderClient:
    """The pool of one text encoder as a function of units. A replica is told where the caller knows Redis to be away:
    one of them waiting for it is enough."""

    def __init__(
        self, handle: DeploymentHandle, encoder: Encoder, redis_away: Callable[[], bool], controller: Controller
    ) -> None:
        self.name = f"text-encoder:{encoder.name}"
        self._handle = handle
        self._redis_away = redis_away
        self._controller = controller
        self._sleeps = encoder.settings.min_replicas == 0
        own = encoder.settings
        self._patience_s = max(CALL_S, own.stall_s) + (own.start_s if self._sleeps else 0.0)

    async def encode(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
        """In the order of `units`. Wakes a pool that sleeps."""
        found: list[Fetched] = await self._ask(self._handle.encode, units)
        return found

    async def prepare(self, units: Sequence[EncodeUnit]) -> list[Tier]:
        """Have the units encoded and kept where they are; where they came from. Wakes a pool that sleeps."""
        found: list[Tier] = await self._ask(self._handle.prepare, units)
        return found

    async def ready(self) -> PoolState:
        """What a replica says of itself. A pool that may sleep isn't asked, because that would keep it awake: Serve's
        controller knows as much of it as matters here."""
        if not self._sleeps:
            return PoolState(True, await _call(self._handle.describe, pool=self.name))
        return await self._controller.awake(self._handle)

    async def _ask(self, method: Any, units: Sequence[EncodeUnit]) -> Any:
        return await _call(method, list(units), self._redis_away(), pool=self.name, within_s=self._patience_s)


class EncoderClients:
    """The pools of all text encoders as one function of units."""

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle],
        encoders: Sequence[Encoder],
        redis_away: Callable[[], bool] = lambda: False,
    ) -> None:
        """`handles` by the fingerprint of the encoder; `redis_away` says what this process knows of the cache Redis."""
        controller = Controller()
        self._pools = {
            each.fingerprint: EncoderClient(handles[each.fingerprint], each, redis_away, controller)
            for each in encoders
        }

    async def encode(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
        """Embeddings in the order of `units`, the pools asked at the same time.

        Raises BackendUnavailable when a pool can't answer, GenerationFailed when it broke on these units.
        """
        return await self._ask(units, EncoderClient.encode)

    async def prepare(self, units: Sequence[EncodeUnit]) -> list[Tier]:
        """As `encode`, but only where each embedding came from: they are kept by the pools and sent nowhere."""
        return await self._ask(units, EncoderClient.prepare)

    @property
    def probes(self) -> dict[str, Callable[[], Awaitable[PoolState]]]:
        """Each pool's `ready`, by the pool's name."""
        return {pool.name: pool.ready for pool in self._pools.values()}

    async def _ask(
        self, units: Sequence[EncodeUnit], call: Callable[[EncoderClient, Sequence[EncodeUnit]], Awaitable[list[T]]]
    ) -> list[T]:
        parts: dict[str, list[EncodeUnit]] = {}
        for unit in units:
            parts.setdefault(unit.encoder, []).append(unit)
        if not parts.keys() <= self._pools.keys():
            raise BackendUnavailable("no text encoder here serves this model", "model", 1.0)
        calls = [asyncio.ensure_future(call(self._pools[encoder], part)) for encoder, part in parts.items()]
        try:
            answers = await asyncio.gather(*calls)
        finally:
            for each in calls:
                each.cancel()  # where one has failed, nobody waits for the others
        streams = {encoder: iter(answer) for encoder, answer in zip(parts, answers, strict=True)}
        return [next(streams[unit.encoder]) for unit in units]


class CaptionClient:
    """The pool that describes pictures."""

    name = "captions"

    def __init__(self, handle: DeploymentHandle, settings: CaptionSettings) -> None:
        self._handle = handle
        self._controller = Controller()
        self._sleeps = settings.min_replicas == 0
        self._patience_s = CALL_S + settings.stall_s + (settings.start_s if self._sleeps else 0.0)

    async def caption(self, ask: Ask) -> Caption:
        """Wakes a pool that sleeps. Raises InvalidRequest, BackendUnavailable, GenerationFailed."""
        told: Caption = await _call(self._handle.caption, ask, pool=self.name, within_s=self._patience_s)
        return told

    async def ready(self) -> PoolState:
        """As an EncoderClient's."""
        if not self._sleeps:
            return PoolState(True, await _call(self._handle.describe, pool=self.name))
        return await self._controller.awake(self._handle)


class DiffusionClient:
    """The replicas of one placement, as far as the ingress speaks with them: jobs reach them through the store."""

    def __init__(self, handle: DeploymentHandle, name: str, sleeps: bool, controller: Controller) -> None:
        """`name` is the pool's, in messages; `sleeps` whether it may have no replicas."""
        self.name = name
        self._handle = handle
        self._sleeps = sleeps
        self._controller = controller

    async def ready(self) -> PoolState:
        """As an EncoderClient's: there may be no replica that could answer."""
        if not self._sleeps:
            return PoolState(True, await _call(self._handle.describe, pool=self.name))
        return await self._controller.awake(self._handle)

    async def benchmark(self, width: int, height: int, steps: int) -> dict[int, list[float]]:
        """Of one replica: batch entries -> seconds of each of `steps` synthetic steps. BackendUnavailable while none
        is awake: a question wakes nobody."""
        if self._sleeps and await self._controller.sleeps(self._handle):
            raise BackendUnavailable(f"the {self.name} pool is asleep, and an order wakes it", None, 1.0)
        found: dict[int, list[float]] = await _call(
            self._handle.benchmark, width, height, steps, pool=self.name, within_s=BENCHMARK_S
        )
        return found


class DiffusionClients:
    """All placements' replicas."""

    def __init__(self, handles: Mapping[str, DeploymentHandle], fleet: Fleet) -> None:
        """`handles` by the placement's name. Alone, a placement's pool is called `diffusion`."""
        alone = len(handles) == 1
        self._fleet = fleet
        controller = Controller()
        sleeping = {each.name for each in fleet.placements if not each.settings.least_replicas}
        self._pools = {
            name: DiffusionClient(handle, "diffusion" if alone else f"diffusion:{name}", name in sleeping, controller)
            for name, handle in handles.items()
        }

    @property
    def probes(self) -> dict[str, Callable[[], Awaitable[PoolState]]]:
        """Each pool's `ready`, by the pool's name."""
        return {pool.name: pool.ready for pool in self._pools.values()}

    async def benchmark(self, model: str, width: int, height: int, steps: int) -> dict[str, dict[int, list[float]]]:
        """By placement, of those that hold such an image of the model: batch entries -> seconds of each step.

        One after the other: on one machine they would take each other's time. Raises BackendUnavailable,
        GenerationFailed.
        """
        return {
            each.name: await self._pools[each.name].benchmark(width, height, steps)
            for each in self._fleet.for_model(model)
            if width * height <= each.max_pixels
        }


async def _call(method: Any, *args: Any, pool: str, within_s: float = CALL_S) -> Any:
    """A pool without replicas answers nothing at all: no call waits longer than `within_s`.

    Where nobody waits any more, the replica hears of it and drops the rows that it has not begun.
    """
    try:
        async with asyncio.timeout(within_s):
            response = method.remote(*args)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
    except RayTaskError as error:
        if isinstance(error.cause, TandemError):
            raise error.cause from None
        raise GenerationFailed(f"the {pool} pool failed on this request") from error
    except BackPressureError as error:
        raise BackendUnavailable(f"the {pool} pool has too many requests waiting", None, 1.0) from error
    except (TimeoutError, RayError, DeploymentUnavailableError) as error:
        raise BackendUnavailable(f"the {pool} pool does not answer", None, 1.0) from error
