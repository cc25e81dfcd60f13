"""The story of one text request: put into words, plan, have it encoded, compose; or say what it would come to.

What jobs count of their text is here too.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.analysis import Analysis, analysis
from serve.aside import read_aside
from serve.domain.conditioning import Conditioning
from serve.domain.text import CacheReport, Note, TextRequest, Tier, TokenCount, Truncation
from serve.encoders.cache import EmbeddingCache
from serve.encoders.census import ProcessReport, RedisCensus, clear_all, read_census
from serve.encoders.compose import compose
from serve.encoders.concepts import ConceptFolder, ConceptInfo
from serve.encoders.export import conditioning_at
from serve.encoders.similarity import Compared, compared, similarity
from serve.errors import BackendUnavailable, InvalidRequest, ModelNotFound
from serve.models import ModelFolder
from serve.orders import MAX_SEED, within
from serve.prompts.advice import notes_on
from serve.prompts.plan import Planner, PromptPlan
from serve.settings.orders import LimitSettings, TemplateSettings
from serve.telemetry.metrics import Metrics
from serve.wording import NewPrompt, Worded, check_length, worded

NO_DENOISER_SIDE = 1024
"""Pixels of a side where neither the client nor a denoiser says otherwise: what SDXL was trained on."""
NO_DENOISER_STEPS = 30
"""Steps where neither says otherwise. They matter to a prompt that changes with them alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewText(NewPrompt):
    """A text order as a client writes it; None takes the model's or the family's default.

    Without a `negative_prompt` nothing is encoded for it; an empty one is a text like any other. `step` is the one of
    `num_inference_steps` whose text is wanted; `seed` makes the random choices.
    """

    seed: int = 0
    num_inference_steps: int | None = None
    step: int = 0
    model: str | None = None
    width: int | None = None
    height: int | None = None
    clip_skip: int | None = None
    use_t5: bool = True
    max_sequence_length: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """By encoder, the cosine between each two of the texts: `matrix[i][j]` that of text i and text j."""

    model: str
    family: str
    compared: tuple[Compared, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """The conditioning of one text, and how it came about. `encoders` are the served ones, in role order."""

    model: str
    family: str
    encoders: tuple[str, ...]
    conditioning: Conditioning
    template: str | None
    arm: str | None
    tokens: tuple[TokenCount, ...]
    truncated: tuple[Truncation, ...]
    notes: tuple[Note, ...]
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
        templates: Mapping[str, TemplateSettings] | None = None,
        concepts: ConceptFolder | None = None,
    ) -> None:
        """`models` and `planners` by name; the first model is the one that a request without a name gets. `templates`
        are those that it may name."""
        self._models = models
        self._planners = planners
        self._embeddings = embeddings
        self._metrics = metrics
        self._limits = limits
        self._cache_url = cache_url
        self._templates = templates or {}
        self._concepts = concepts

    def models(self) -> Mapping[str, ModelFolder]:
        """Those whose text is encoded here, by name."""
        return self._models

    async def concepts(self) -> dict[str, tuple[ConceptInfo, ...]]:
        """What each model knows by `<name>`, by the model's name."""
        folder = self._concepts
        if folder is None:
            return dict.fromkeys(self._models, ())

        def listed() -> dict[str, tuple[ConceptInfo, ...]]:
            return {name: folder.of(model).list() for name, model in self._models.items()}

        return await asyncio.to_thread(listed)

    async def embed(self, order: NewText) -> Embedded:
        """Raises InvalidRequest, ModelNotFound, BackendUnavailable, GenerationFailed."""
        model = self._model(order.model)
        request, text = await read_aside(order.characters, lambda: self._complete(order, model))
        within("step", order.step, 0, request.num_inference_steps - 1)
        plan, notes = await read_aside(
            request.characters, lambda: (self._planners[model.name].plan(request), notes_on(request))
        )
        if plan.composed > 1:
            raise InvalidRequest("prompt: AND is several texts at once, and embeddings are of one", "prompt")
        count_prompts(self._metrics, plan)
        fetched = await self._embeddings.get_many(plan.units)
        tiers = {key: got.tier for key, got in fetched.items()}
        count_text(self._metrics, plan, tiers)
        # In a thread: a T5's context is megabytes, and this loop serves everybody.
        values = {key: got.value for key, got in fetched.items()}
        conditioning = await asyncio.to_thread(lambda: conditioning_at(compose(plan, values), order.step))
        return Embedded(
            model=model.name,
            family=model.family,
            encoders=tuple(dict.fromkeys(count.encoder for count in plan.tokens)),
            conditioning=conditioning,
            template=text.template,
            arm=text.arm,
            tokens=plan.tokens,
            truncated=plan.truncated,
            notes=notes,
            cache=report(tiers),
        )

    async def analyze(self, order: NewText) -> Analysis:
        """What the order's prompts come to. Nothing is encoded, and it counts as no use of anything. Raises
        InvalidRequest, ModelNotFound."""
        model = self._model(order.model)
        request, text = await read_aside(order.characters, lambda: self._complete(order, model))
        planner = self._planners[model.name]
        plan = await read_aside(request.characters, lambda: planner.plan(request))
        tiers = await self._embeddings.look(plan.units)
        guided = _guided(order, model)
        return await read_aside(
            request.characters,
            lambda: analysis(request, planner, plan, tiers, guided=guided, template=text.template, arm=text.arm),
        )

    async def similarity(
        self, texts: Sequence[str], model: str | None, encoder: str | None, salt: str = ""
    ) -> Similarity:
        """How near texts are to one another for the encoders of a model, or for the one of that name. Their weights say
        nothing of that. Raises InvalidRequest, ModelNotFound, BackendUnavailable, GenerationFailed."""
        folder = self._model(model)
        for at, text in enumerate(texts):
            check_length(f"prompts.{at}", text, self._limits)
        wanted = await read_aside(
            sum(map(len, texts)), lambda: similarity(texts, self._planners[folder.name], encoder, salt)
        )
        fetched = await self._embeddings.get_many([unit for each in wanted for unit in each.units])
        values = {key: got.value for key, got in fetched.items()}
        found = await asyncio.to_thread(lambda: tuple(compared(each, values) for each in wanted))
        return Similarity(model=folder.name, family=folder.family, compared=found)

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

    def _complete(self, order: NewText, model: ModelFolder) -> tuple[TextRequest, Worded]:
        denoiser = model.denoiser
        steps = order.num_inference_steps
        if steps is None:
            steps = denoiser.default_num_inference_steps if denoiser else NO_DENOISER_STEPS
        within("num_inference_steps", steps, 1, self._limits.max_num_inference_steps)
        within("seed", order.seed, 0, MAX_SEED)
        text = worded(order, self._templates, self._limits, seed=order.seed, num_inference_steps=steps)
        request = TextRequest(
            model=model.name,
            prompt=text.prompt,
            negative_prompt=text.negative_prompt,
            num_inference_steps=steps,
            syntax=text.syntax,
            weighting=order.prompt_weighting,
            long_prompt=order.long_prompt,
            width=self._side("width", order.width, denoiser.default_width if denoiser else NO_DENOISER_SIDE),
            height=self._side("height", order.height, denoiser.default_height if denoiser else NO_DENOISER_SIDE),
            clip_skip=order.clip_skip,
            use_t5=order.use_t5,
            max_sequence_length=order.max_sequence_length,
            salt=order.salt,
        )
        return request, text

    def _side(self, field: str, pixels: int | None, default: int) -> int:
        """Any size, on a denoiser's grid or off it: whoever draws the picture elsewhere knows theirs."""
        if pixels is None:
            return default
        within(field, pixels, 1, self._limits.max_side)
        return pixels


def _guided(order: NewText, model: ModelFolder) -> bool:
    """Whether steps would read a negative prompt, where the order says no more than its text."""
    denoiser = model.denoiser
    if denoiser is None:
        return True
    if denoiser.guidance != "classifier_free":
        return (order.true_cfg_scale or 1.0) > 1
    scale = denoiser.default_guidance_scale if order.guidance_scale is None else order.guidance_scale
    return scale > 1


def report(tiers: Mapping[str, Tier]) -> CacheReport:
    """How many units came from which tier."""
    number = Counter(tiers.values())
    return CacheReport(memory=number[Tier.MEMORY], redis=number[Tier.REDIS], encoded=number[Tier.ENCODED])


def count_text(metrics: Metrics, plan: PromptPlan, tiers: Mapping[str, Tier]) -> None:
    """Count where the plan's units came from; `tiers` by unit key.

    Keys that the plan doesn't have are passed over: during a rollout, text was encoded ahead for another encoder.
    """
    names = {count.role: count.encoder for count in plan.tokens}
    encoders = {read.unit.key: names[read.role] for read in plan.reads}
    signs = plan.signs
    for (encoder, tier, sign), number in Counter(
        (encoders[key], tier, signs[key]) for key, tier in tiers.items() if key in encoders
    ).items():
        metrics.inc("tandem_text_units_total", number, encoder=encoder, tier=tier, sign=sign)


def count_prompts(metrics: Metrics, plan: PromptPlan) -> None:
    """Count the plan's prompts, what was cut from them, and their tokens and rows by encoder."""
    metrics.inc("tandem_prompts_total", 2 if plan.guided else 1)
    if plan.truncated:
        metrics.inc("tandem_truncated_prompts_total", len({cut.field for cut in plan.truncated}))
    for count in plan.tokens:
        metrics.inc("tandem_prompt_chunks_total", count.chunks, encoder=count.encoder)
        for kind, number in (("used", count.used), ("cut", count.cut), ("unknown", count.unknown)):
            if number:
                metrics.inc("tandem_prompt_tokens_total", number, encoder=count.encoder, kind=kind)
