"""`tandem bench encode`: all measurements of the encoder pool, in order, and what they are held against."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from serve.bench.hits import HitLatency, measure_hits
from serve.bench.load import GIVE_UP_S
from serve.bench.machine import Machine, OtherWork, Peaks, this_machine
from serve.bench.pool_load import PoolLatency, measure_pool
from serve.bench.precision import Precision, StoredValues, measure_precisions
from serve.bench.service import (
    Caller,
    Loss,
    RedisLoss,
    Serve,
    ServiceLatency,
    ServicePlan,
    measure_loss,
    measure_service,
)
from serve.bench.shapes import EncoderShape, model_of
from serve.bench.throughput import Throughput, measure_throughput
from serve.bench.weights import encoder_of, random_encoder, write_model
from serve.bench.windows import Budget
from serve.embedded import EmbeddedRedis
from serve.encoders.forward import TextTower
from serve.models import TextPart
from serve.settings.pools import EncoderSettings
from serve.settings.room import MIB, Dtype
from serve.settings.stores import CacheSettings

Section = Literal["throughput", "pool", "precision", "hits", "service", "loss"]
SECTIONS: tuple[Section, ...] = get_args(Section)
LOSSES: tuple[Loss, ...] = get_args(Loss)
HITS_A_SECOND = 50
"""Samples of each kind of hit for a second of the plan's open loops."""
_LOOK = 0.02
_PRECISION_WINDOWS = 3
_USUAL_BATCH = 8
_REDIS_BYTES = 1024 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured. `seconds` is the length of one open loop; everything else is a part of it.

    `precise` are the encoders of the precision table, with `compiled` layers too; `served` those that are measured
    through a whole server. The first of these loses its Redis.
    """

    shapes: tuple[EncoderShape, ...]
    device: str
    dtype: Dtype
    seconds: float
    seed: int
    sections: frozenset[Section]
    precise: frozenset[str]
    served: frozenset[str]
    compiled: bool = True

    @property
    def budget(self) -> Budget:
        return Budget(windows=5, window_s=self.seconds / 10, longest_s=self.seconds / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that was measured, in the order of the plan's encoders. Seconds, bytes, operations a second.

    `other_work` is the share of the processors that other processes took while encoders were measured in this one.
    """

    machine: Machine
    device: str
    dtype: Dtype
    seconds: float
    seed: int
    other_work: float | None = None
    throughput: list[Throughput] = field(default_factory=list)
    pools: list[PoolLatency] = field(default_factory=list)
    precisions: list[Precision] = field(default_factory=list)
    stored: list[StoredValues] = field(default_factory=list)
    hits: list[HitLatency] = field(default_factory=list)
    services: list[ServiceLatency] = field(default_factory=list)
    losses: list[RedisLoss] = field(default_factory=list)


async def measure(plan: Plan, serve: Serve, tell: Callable[[str], None]) -> Report:
    """Measure all of the plan; `tell` hears what comes next. Raises OperatorError where a server does not start."""
    report = Report(machine=this_machine(), device=plan.device, dtype=plan.dtype, seconds=plan.seconds, seed=plan.seed)
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as scratch:
        run = _Run(plan, report, Path(scratch), serve, tell)
        for shape in plan.shapes:
            await run.alone(shape)
        report = replace(report, other_work=run.others.share)
        if "hits" in plan.sections:
            await run.hits()
        if plan.sections & {"service", "loss"}:
            for number, shape in enumerate(shape for shape in plan.shapes if shape.name in plan.served):
                await run.served(shape, loses=number == 0 and "loss" in plan.sections)
    return report


class _Run:
    """One run of a plan. Fills the report; everything that it writes lies in `scratch`."""

    def __init__(self, plan: Plan, report: Report, scratch: Path, serve: Serve, tell: Callable[[str], None]) -> None:
        self._plan = plan
        self._report = report
        self._scratch = scratch
        self._serve = serve
        self._tell = tell
        self._settings = EncoderSettings(dtype=plan.dtype, slow_s=GIVE_UP_S)  # a log line a request is no measurement
        self._peaks = Peaks(plan.device, plan.seconds * _LOOK)
        self.others = OtherWork()
        self._best_sizes: dict[str, int] = {}

    async def alone(self, shape: EncoderShape) -> None:
        """One encoder in this process."""
        wanted = self._plan.sections & {"throughput", "pool"}
        precise = "precision" in self._plan.sections and shape.name in self._plan.precise
        if not wanted and not precise:
            return
        self._tell(f"{shape.name}: making weights")
        with random_encoder(shape, self._plan.seed, self._scratch / shape.name) as part, self.others:
            if wanted:
                await self._speed(shape, part)
            if precise:
                self._precision(shape, part)
            gc.collect()  # an encoder's weights are gigabytes, and may hang in a cycle

    async def hits(self) -> None:
        self._tell("cache hits")
        with EmbeddedRedis(self._scratch / "hits", "cache", _REDIS_BYTES) as redis:
            self._report.hits.extend(await measure_hits(redis.url, round(HITS_A_SECOND * self._plan.seconds)))

    async def served(self, shape: EncoderShape, *, loses: bool) -> None:
        """A whole server of a model with this encoder; where it `loses`, with and without its Redis."""
        plan, report, shapes = self._plan, self._report, model_of(shape)
        name = " + ".join(each.name for each in shapes)
        self._tell(f"{name}: starting a server")
        place = self._scratch / f"served-{shape.name}"
        write_model(shapes, plan.seed, place / "model")
        task = ServicePlan(
            encoder=name,
            concurrency=self._concurrency(shape),
            seconds=plan.seconds,
            seed=plan.seed,
            timeout_s=CacheSettings().timeout_s,
        )
        length = shape.row_tokens if shape.kind == "t5" else None
        with EmbeddedRedis(place / "redis", "cache", _REDIS_BYTES) as redis:
            settings = self._server_settings(redis.url, len(shapes))
            async with self._serve(place / "model", settings) as url, Caller(url, length) as caller:
                self._tell(f"{name}: load on the server")
                latencies = await measure_service(caller.encode, task)
                report.services.append(latencies)
                for loss in LOSSES if loses else ():
                    self._tell(f"{name}: load on the server, Redis {loss} in the middle")
                    report.losses.append(await measure_loss(caller.encode, redis, task, loss, latencies))
        shutil.rmtree(place / "model")

    async def _speed(self, shape: EncoderShape, part: TextPart) -> None:
        plan = self._plan
        encoder = encoder_of(shape, part, self._settings)
        tower = TextTower.load(encoder, plan.device)
        measured = None
        if "throughput" in plan.sections:
            self._tell(f"{shape.name}: one by one and in batches")
            measured = measure_throughput(tower, shape, plan.dtype, self._peaks, plan.budget, plan.seed)
            self._best_sizes[shape.name] = measured.best.size
        if "pool" in plan.sections:
            self._tell(f"{shape.name}: load on the pool")
            users = self._concurrency(shape)
            pool = await measure_pool(tower, encoder, shape, concurrency=users, seconds=plan.seconds, seed=plan.seed)
            self._report.pools.append(pool)
            measured = measured and replace(measured, idle_s=pool.miss.p50)
        if measured is not None:
            self._report.throughput.append(measured)

    def _precision(self, shape: EncoderShape, part: TextPart) -> None:
        self._tell(f"{shape.name}: precisions")
        budget = replace(self._plan.budget, windows=_PRECISION_WINDOWS)
        plan, settings = self._plan, self._settings
        measured, stored = measure_precisions(
            shape, part, settings, plan.device, budget, self._peaks, compiled=plan.compiled
        )
        self._report.precisions.extend(measured)
        self._report.stored.extend(stored)

    def _concurrency(self, shape: EncoderShape) -> int:
        """Requests at once that keep the best batches coming: one is computed, one waits."""
        return 2 * self._best_sizes.get(shape.name, _USUAL_BATCH)

    def _server_settings(self, redis_url: str, encoders: int) -> dict[str, dict[str, object]]:
        """Text alone; without memory, so that Redis is what its loss takes away; with the threads that this process
        measured with, where Ray would give a replica one. Else the defaults."""
        plan, threads = self._plan, self._report.machine.threads
        place = {"torch_threads": threads} if plan.device == "cpu" else {"num_gpus": 1 / encoders}
        return {
            "diffusion": {"replicas": 0},
            "cache": {"redis_url": redis_url, "memory_bytes": 0},
            "encoder": {"dtype": plan.dtype, "device": plan.device, "slow_s": GIVE_UP_S, **place},
        }
