"""`tandem bench service`: what the service costs over the bare engine on the same cores."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import psutil

from loadtest.bench.bare import Bare
from loadtest.bench.service_load import Look, Saturated, entered, measure_saturated
from loadtest.bench.service_overhead import Overhead, Text, default_order, fresh_texts, measure_overhead
from loadtest.bench.service_redis import SERVERS, RedisCosts, Watch, measure_redis
from loadtest.bench.service_start import Memory, Start, Starts, memory_of, read_start, starts_of, told_ready
from loadtest.processes import Outside, Use, usage
from loadtest.servers import TANDEM, Budget, Serving, serving
from serve.bench.machine import Machine, this_machine
from serve.bench.mixed import mixed_orders
from serve.embedded import EmbeddedRedis, running_url
from serve.errors import OperatorError
from serve.models import ModelFolder, resolve
from serve.origins import load_args
from serve.settings.pools import ModelSettings
from serve.settings.tree import Settings
from serve.shapes.captions import held_out_prompts

Section = Literal["saturated", "overhead", "redis", "start"]
SECTIONS: tuple[Section, ...] = get_args(Section)
PROMPTS = 16
KINDS: tuple[tuple[int, Text], ...] = ((4, "cached"), (20, "cached"), (4, "fresh"), (20, "fresh"))
"""Steps and text of the orders that are sent one at a time."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`orders` is how many one turn of the saturated section has, `pairs` how many of each order are sent one at a
    time, `jobs` how many of each kind are counted at Redis; `idle_s` is how long the idle server is looked at, there
    and before it is saturated; `starts` is how often the server is started for its start's sake. `settings` are the
    server's, in groups; `environ` are more variables of its environment."""

    sections: frozenset[Section]
    cores: tuple[int, ...]
    torch_threads: int
    rounds: int
    orders: int
    pairs: int
    jobs: int
    idle_s: float
    starts: int
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that was measured; None is a section that was not asked for. `memory` is at rest after the start,
    `memory_later` after the sections `redis` and `overhead`. `other_work` is the share of the processors that belonged
    to neither the server nor the bare engine nor the bench."""

    machine: Machine
    cores: tuple[int, ...]
    torch_threads: int
    rounds: int
    seed: int
    settings: Mapping[str, Any]
    environ: Mapping[str, str]
    other_work: float | None = None
    saturated: Saturated | None = None
    overhead: tuple[Overhead, ...] = ()
    redis: RedisCosts | None = None
    starts: Starts | None = None
    memory: tuple[Memory, ...] = ()
    memory_later: tuple[Memory, ...] = ()


async def measure(plan: Plan, tell: Tell) -> Report:
    """All of the plan. `redis` and `overhead` have one server for both, `saturated` one for each turn, `start` as many
    as are said. `tell` hears what comes next. Raises OperatorError."""
    settings = load_args(plan.settings, environ={}).settings
    report = Report(
        machine=replace(this_machine(), threads=plan.torch_threads),
        cores=plan.cores,
        torch_threads=plan.torch_threads,
        rounds=plan.rounds,
        seed=plan.seed,
        settings=plan.settings,
        environ=plan.environ,
    )
    with contextlib.ExitStack() as stack:
        # Short: sockets lie in it.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tb-")))
        stack.enter_context(_environment(plan.environ))
        outside = stack.enter_context(Outside())
        bench = _Bench(
            plan=plan,
            settings=settings,
            redis=None,
            model=resolve(ModelSettings(), scratch),
            prompts=[text for text, _ in held_out_prompts(PROMPTS)],
            tell=tell,
        )
        if plan.sections - {"saturated"}:
            with contextlib.nullcontext() if settings.cache.redis_url else _cache_redis(settings, scratch) as redis:
                report = await replace(bench, redis=redis).all_but_saturated(report)
        if "saturated" in plan.sections:
            report = replace(report, saturated=await bench.saturated(scratch))
    return replace(report, other_work=outside.share)


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """One run. `redis` is the server's Redis for embeddings, started here; None where the settings name one, or where
    the server is to start its own."""

    plan: Plan
    settings: Settings
    redis: EmbeddedRedis | None
    model: ModelFolder
    prompts: Sequence[str]
    tell: Tell

    async def all_but_saturated(self, report: Report) -> Report:
        plan = self.plan
        self.tell("starting the server")
        async with self._started() as (server, start, look):
            if "start" in plan.sections:
                report = replace(report, memory=memory_of(look()))
            if "redis" in plan.sections:
                self.tell("Redis")
                report = replace(report, redis=await self._redis(server))
            if "overhead" in plan.sections:
                report = replace(report, overhead=await self._overheads(server))
            if "start" in plan.sections and plan.sections & {"redis", "overhead"}:
                report = replace(report, memory_later=memory_of(look()))
        if "start" in plan.sections:
            starts = [start]
            while len(starts) < plan.starts:
                self.tell(f"start {len(starts) + 1} of {plan.starts}")
                async with self._started() as (_, another, _look):
                    starts.append(another)
            report = replace(report, starts=starts_of(starts))
        return report

    async def saturated(self, scratch: Path) -> Saturated:
        """All servers and the bare engine share one data_dir: the first start measures the steps, and all make batches
        of the same size."""
        plan, data_dir = self.plan, scratch / "data"
        orders = mixed_orders(self.model, self.prompts, plan.orders * plan.rounds, plan.seed)

        @asynccontextmanager
        async def started() -> AsyncIterator[tuple[str, Look]]:
            async with serving(TANDEM, budget=self._budget, settings=self._tree, data_dir=data_dir) as server:
                yield server.url, lambda: usage(server.root)

        bare = Bare(self._tree, data_dir=data_dir, cores=plan.cores, prompts=self.prompts)
        in_hand = self.settings.diffusion.max_rows
        try:
            return await measure_saturated(started, bare, orders, plan.rounds, in_hand, plan.idle_s, self.tell)
        except ValueError as error:
            raise OperatorError(f"saturated: {error}") from None

    async def _overheads(self, server: Serving) -> tuple[Overhead, ...]:
        """In pairs, beside the idle server: each request of one has its twin a moment before or after."""
        self.tell("starting the bare engine")
        fresh = fresh_texts(self.prompts, self.plan.seed)
        async with entered(
            Bare(self._tree, data_dir=server.data_dir, cores=self.plan.cores, prompts=self.prompts)
        ) as bare:
            return tuple([await self._overhead(server, bare, *kind, fresh) for kind in KINDS])

    async def _overhead(
        self, server: Serving, bare: Bare, steps: int, text: Text, fresh: Callable[[], str]
    ) -> Overhead:
        self.tell(f"one at a time: {steps} steps, {text} text")
        order = replace(default_order(self.model, self.prompts[0], self.plan.seed), num_inference_steps=steps)
        return await asyncio.to_thread(measure_overhead, server.url, bare, order, text, self.plan.pairs, fresh)

    async def _redis(self, server: Serving) -> RedisCosts:
        given = self.settings.jobs.redis_url, self.settings.cache.redis_url
        jobs = given[0].get_secret_value() if given[0] else running_url(server.data_dir)
        cache = given[1].get_secret_value() if given[1] else self.redis.url if self.redis else None
        if jobs is None or cache is None:
            raise OperatorError("the server's Redis is not found")
        order = default_order(self.model, self.prompts[0], self.plan.seed)
        with Watch(dict(zip(SERVERS, (jobs, cache), strict=True))) as watch:
            return await measure_redis(server.url, watch, order, jobs=self.plan.jobs, idle_s=self.plan.idle_s)

    @asynccontextmanager
    async def _started(self) -> AsyncIterator[tuple[Serving, Start, Look]]:
        async with serving(TANDEM, budget=self._budget, settings=self._tree) as server:
            first_image_at = time.time()

            def look() -> dict[int, Use]:
                redis = self.redis.pid if self.redis else None
                return usage(server.root) | (usage(psutil.Process(redis)) if redis else {})

            start = read_start(usage(server.root, memory=False), await told_ready(server.data_dir), first_image_at)
            yield server, start, look

    @property
    def _budget(self) -> Budget:
        return Budget(cores=self.plan.cores, torch_threads=self.plan.torch_threads)

    @property
    def _tree(self) -> dict[str, Any]:
        """The settings of the server and of the bare engine."""
        given = self.plan.settings
        cache = {"redis_url": self.redis.url} if self.redis else {}
        diffusion = {"torch_threads": self.plan.torch_threads, **given.get("diffusion", {})}
        return {**given, "diffusion": diffusion, "cache": {**given.get("cache", {}), **cache}}


def _cache_redis(settings: Settings, scratch: Path) -> EmbeddedRedis:
    """What the server would have started itself: its own tells nobody its address, and is to be asked for its
    counters."""
    return EmbeddedRedis(scratch, "cache", settings.cache.embedded_bytes)


@contextmanager
def _environment(extra: Mapping[str, str]) -> Iterator[None]:
    """These variables for all that is started meanwhile."""
    before = {name: os.environ.get(name) for name in extra}
    os.environ.update(extra)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
