"""The story of one text request: check, plan, have it encoded, compose. What jobs count of their text is here too."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from serve.domain import CacheReport, Conditioning, TextRequest, Tier, Truncation
from serve.encoders.cache import EmbeddingCache
from serve.encoders.census import ProcessReport, RedisCensus, clear_all, read_census
from serve.encoders.compose import compose
from serve.errors import BackendUnavailable, ModelNotFound
from serve.models import ModelFolder
from serve.orders import check_prompts, within
from serve.prompts.plan import Planner, PromptPlan, TokenCount
from serve.settings import LimitSettings
from serve.telemetry.metrics import Metrics

NO_DENOISER_SIDE = 1024
"""Pixels of a side where neither the client nor a denoiser says otherwise: what SDXL was trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewText:
    """A text order as a client writes it; None takes the model's or the family's default.

    Without a `negative_prompt` nothing is encoded for it; an empty one is a text like any other.
    """

    prompt: str
    negative_prompt: str | None = None
    model: str | None = None
    width: int | None = None
    height: int | None = None
    clip_skip: int | None = None
    use_t5: bool = True
    max_sequence_length: int | None = None
    salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """The conditioning of one text, and how it came about. `encoders` are the served ones, in role order."""

    model: str
    family: str
    encoders: tuple[str, ...]
    conditioning: Conditioning
    tokens: tuple[TokenCount, ...]
    truncated: tuple[Truncation, ...]
    cache: CacheReport


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOverview:
    """Where embeddings are kept. `redis` is None where there is none that answers, and `detail` says why; then this
    process is the only one in `processes`."""

    redis: RedisCensus | None
    detail: str
    processes: tuple[ProcessReport, ...]


class TextService:
    """Embeddings of any served model's text, and the cache that they come from.

    Holds nothing of its own: the cache is the process's, and whoever made it closes it.
    """

    def __init__(
        self,
        *,
        models: Mapping[str, ModelFolder],
        planners: Mapping[str, Planner],
        embeddings: EmbeddingCache,
        metrics: Metrics,
        limits: LimitSettings,
        cache_url: str | None,
    ) -> None:
        """`models` and `planners` by name; the first model is the one that a request without a name gets."""
        self._models = models
        self._planners = planners
        self._embeddings = embeddings
        self._metrics = metrics
        self._limits = limits
        self._cache_url = cache_url

    def models(self) -> dict[str, str]:
        """Family of each model whose text is encoded here, by the model's name."""
        return {name: model.family for name, model in self._models.items()}

    async def embed(self, order: NewText) -> Embedded:
        """Raises InvalidRequest, ModelNotFound, BackendUnavailable, GenerationFailed."""
        model = self._model(order.model)
        plan = self._planners[model.name].plan(self._complete(order, model))
        count_prompts(self._metrics, plan)
        fetched = await self._embeddings.get_many(plan.units)
        tiers = {key: got.tier for key, got in fetched.items()}
        count_text(self._metrics, plan, tiers)
        # In a thread: a T5's context is megabytes, and this loop serves everybody.
        conditioning = await asyncio.to_thread(compose, plan, {key: got.value for key, got in fetched.items()})
        return Embedded(
            model=model.name,
            family=model.family,
            encoders=tuple(dict.fromkeys(count.encoder for count in plan.tokens)),
            conditioning=conditioning,
            tokens=plan.tokens,
            truncated=plan.truncated,
            cache=report(tiers),
        )

    async def cache(self) -> CacheOverview:
        """Never fails for a lack of Redis: it is what one looks at then."""
        if self._cache_url is None:
            return self._alone("cache.redis_url is not set")
        try:
            census = await read_census(self._cache_url)
        except BackendUnavailable as error:
            return self._alone(error.message)
        return CacheOverview(
            redis=census.redis, detail="up", processes=tuple(process.report for process in census.processes)
        )

    async def clear(self) -> int:
        """Remove every embedding from Redis, and tell every process to empty its memory; how many Redis had.

        Raises BackendUnavailable without Redis: nothing else reaches the other processes.
        """
        if self._cache_url is None:
            raise BackendUnavailable(
                "cache.redis_url is not set: each process has a cache of its own", "cache.redis_url"
            )
        removed = await clear_all(self._cache_url)
        self._embeddings.clear()
        return removed

    def _alone(self, detail: str) -> CacheOverview:
        own = ProcessReport.of(self._embeddings, "this process")
        return CacheOverview(redis=None, detail=detail, processes=(own,))

    def _model(self, name: str | None) -> ModelFolder:
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            served = ", ".join(map(repr, self._models))
            raise ModelNotFound(f"model {name!r} is not served here; this server has {served}", "model")
        return self._models[name]

    def _complete(self, order: NewText, model: ModelFolder) -> TextRequest:
        check_prompts(order.prompt, order.negative_prompt, self._limits)
        denoiser = model.denoiser
        return TextRequest(
            model=model.name,
            prompt=order.prompt,
            negative_prompt=order.negative_prompt,
            width=self._side("width", order.width, denoiser.default_width if denoiser else NO_DENOISER_SIDE),
            height=self._side("height", order.height, denoiser.default_height if denoiser else NO_DENOISER_SIDE),
            clip_skip=order.clip_skip,
            use_t5=order.use_t5,
            max_sequence_length=order.max_sequence_length,
            salt=order.salt,
        )

    def _side(self, field: str, pixels: int | None, default: int) -> int:
        """Any size, on a denoiser's grid or off it: whoever draws the picture elsewhere knows theirs."""
        if pixels is None:
            return default
        within(field, pixels, 1, self._limits.max_side)
        return pixels


def report(tiers: Mapping[str, Tier]) -> CacheReport:
    """How many units came from which tier."""
    number = Counter(tiers.values())
    return CacheReport(memory=number[Tier.MEMORY], redis=number[Tier.REDIS], encoded=number[Tier.ENCODED])


def count_text(metrics: Metrics, plan: PromptPlan, tiers: Mapping[str, Tier]) -> None:
    """Count where the plan's units came from; `tiers` by unit key.

    Keys that the plan doesn't have are passed over: during a rollout, text was encoded ahead for another encoder.
    """
    names = {count.role: count.encoder for count in plan.tokens}
    negative = () if plan.negative is None else plan.negative.reads
    encoders = {read.unit.key: names[read.role] for read in (*plan.positive.reads, *negative)}
    signs = plan.signs
    for (encoder, tier, sign), number in Counter(
        (encoders[key], tier, signs[key]) for key, tier in tiers.items() if key in encoders
    ).items():
        metrics.inc("tandem_text_units_total", number, encoder=encoder, tier=tier, sign=sign)


def count_prompts(metrics: Metrics, plan: PromptPlan) -> None:
    """Count the plan's prompts, what was cut from them, and their tokens by encoder."""
    metrics.inc("tandem_prompts_total", 1 if plan.negative is None else 2)
    if plan.truncated:
        metrics.inc("tandem_truncated_prompts_total", len({cut.field for cut in plan.truncated}))
    for count in plan.tokens:
        for kind, number in (("used", count.used), ("cut", count.cut), ("unknown", count.unknown)):
            if number:
                metrics.inc("tandem_prompt_tokens_total", number, encoder=count.encoder, kind=kind)
