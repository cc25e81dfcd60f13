"""The deployment graph: every deployment, its options and its bindings, in reading order.

`deployments.app:build` is the import path by which a Serve configuration (KubeRay's `serveConfigV2`) names it; its
`args` are the settings tree. `tandem up` takes `application`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import RayServeException

from deployments.autoscaling import REPORT_S, WINDOW_S
from deployments.captions import Captions
from deployments.diffusion import Diffusion
from deployments.ingress import Ingress
from deployments.parts import check_urls
from deployments.text_encoder import DOOR, TextEncoder
from serve.catalog import open_catalog
from serve.encoders.registry import Encoder
from serve.errors import OperatorError
from serve.models.captioner import captioner_of
from serve.origins import load_args, plain_secrets, variable_of
from serve.placements import GPU_CLASS_LABEL, HERE, Placement, plan_placements, setting_of
from serve.scaling.places import places_of, store_at
from serve.settings.pools import CaptionSettings, DiffusionSettings, EncoderSettings
from serve.settings.tree import Settings

log = logging.getLogger(__name__)

POLICY = "deployments.autoscaling:QueuedTokens"
BACKLOG = "deployments.autoscaling:BacklogSeconds"
AFFINITY = "deployments.affinity:UnitAffinity"
MAX_QUEUED = 500
"""Requests of one process that may wait for a replica of a text encoder; one more is refused at once. Fewer than the
requests that an ingress takes (`http.max_connections`): else it would never come to that."""
MAX_QUEUED_PICTURES = 64
"""The same of those that are to be described: each has its PNG in memory, and a caption takes a second and more."""
HEALTH: dict[str, Any] = {"health_check_period_s": 3.0, "health_check_timeout_s": 5.0}
"""Ray Serve replaces a replica that failed three times in a row: one that answers nothing any more within 24 s."""


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application for the `args` of a Serve configuration, and for the environment where they leave something open.

    Raises Serve's own exception, of which its status shows the one line. Of any other it shows the trace, after it has
    tried three times more.
    """
    try:
        settings = load_args(args).settings
        check_for_cluster(settings)
        for name in plain_secrets(settings):
            log.warning("%s: it is in args, which Ray keeps and shows; in %s nobody sees it", name, variable_of(name))
        return application(settings)
    except OperatorError as error:
        raise RayServeException(error.message) from None


def check_for_cluster(settings: Settings) -> None:
    """Raises OperatorError naming what `tandem up` would bring along, and a cluster must be given."""
    for setting, url in (("jobs.redis_url", settings.jobs.redis_url), ("cache.redis_url", settings.cache.redis_url)):
        if url is None:
            told = f"{setting}: a cluster needs a Redis of its own; name it in {variable_of(setting)} on every node"
            raise OperatorError(told, setting)
    check_urls(settings)


def application(settings: Settings) -> serve.Application:
    """The application for a settings tree whose Redis URLs are filled in. Raises OperatorError naming a setting."""
    catalog = open_catalog(settings)
    encoders = {encoder.fingerprint: text_encoder(encoder, settings) for encoder in catalog.registry.encoders}
    placements = plan_placements(settings, catalog.drawn)
    diffusion = {each.name: denoiser(each, settings, encoders, placements) for each in placements}

    return serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=settings.http.replicas,
        max_ongoing_requests=settings.http.max_connections,
        ray_actor_options={"num_cpus": settings.http.num_cpus, **beside_cards(settings)},
        graceful_shutdown_timeout_s=settings.http.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        **HEALTH,
    ).bind(settings, encoders, diffusion, captions(settings))


def denoiser(
    placement: Placement,
    settings: Settings,
    encoders: Mapping[str, serve.Application],
    placements: Sequence[Placement],
) -> serve.Application:
    """One model on one GPU class, one of `placements`. Raises OperatorError."""
    own = placement.settings
    return serve.deployment(
        Diffusion,
        name=f"Diffusion-{placement.name}",
        **denoisers(placement, settings, placements),
        ray_actor_options=actor_options(own, settings, setting_of(settings, placement.name, "num_gpus")),
        graceful_shutdown_timeout_s=own.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        **HEALTH,
    ).bind(settings, placement.name, encoders)


def denoisers(placement: Placement, settings: Settings, placements: Sequence[Placement]) -> dict[str, Any]:
    """How many: by the work of all placements, because a job may go to any that holds it."""
    own = placement.settings
    if own.least_replicas == own.most_replicas:
        return {"num_replicas": own.replicas}
    url = settings.jobs.redis_url
    assert url is not None  # filled in by now
    kwargs = {
        "placement": placement.name,
        "places": [asdict(place) for place in places_of(placements)],
        "store": asdict(store_at(url)),
        "idle_s": own.idle_s,
    }
    # Said only where it must be: at each change of settings Serve goes back to it, whatever there is to do.
    initial = {"initial_replicas": own.replicas} if own.replicas > own.least_replicas else {}
    return {
        "autoscaling_config": initial
        | {
            "min_replicas": own.least_replicas,
            "max_replicas": own.most_replicas,
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 0.0,
            "policy": AutoscalingPolicy(policy_function=BACKLOG, policy_kwargs=kwargs),
        }
    }


def text_encoder(encoder: Encoder, settings: Settings) -> serve.Application:
    """The pool of one text encoder, which all models share that have it. OperatorError for a share of several GPUs."""
    own = encoder.settings
    if own.num_gpus > 1 and own.num_gpus % 1:
        place = encoder.setting("num_gpus")
        raise OperatorError(f"{place}: {own.num_gpus:g}: above 1 it must be whole", place)
    return serve.deployment(
        TextEncoder,
        name=f"TextEncoder-{encoder.name}",
        **replicas(own),
        max_ongoing_requests=max(DOOR, 8 * own.max_batch_size),
        max_queued_requests=MAX_QUEUED,
        ray_actor_options=actor_options(own, settings, encoder.setting("num_gpus")),
        **HEALTH,
    ).bind(settings, encoder.name)


def captions(settings: Settings) -> serve.Application | None:
    """The pool that describes pictures; None where none is offered. Raises OperatorError."""
    own = settings.captions
    if captioner_of(own) is None:
        return None
    return serve.deployment(
        Captions,
        name="Captions",
        **caption_replicas(own),
        max_ongoing_requests=4 * own.max_batch_size,
        max_queued_requests=MAX_QUEUED_PICTURES,
        ray_actor_options=actor_options(own, settings, "captions.num_gpus"),
        **HEALTH,
    ).bind(settings)


def caption_replicas(own: CaptionSettings) -> dict[str, Any]:
    """How many: by the pictures that wait, as Serve's own policy counts them."""
    if own.min_replicas == own.max_replicas:
        return {"num_replicas": own.max_replicas}
    # As an encoder's pool: what does not work here is found out at the start.
    initial = {} if own.min_replicas else {"initial_replicas": 1}
    return {
        "autoscaling_config": initial
        | {
            "min_replicas": own.min_replicas,
            "max_replicas": own.max_replicas,
            "target_ongoing_requests": own.max_batch_size,
            "upscale_delay_s": WINDOW_S,
            "downscale_delay_s": own.idle_s,
        }
    }


def actor_options(
    own: EncoderSettings | DiffusionSettings | CaptionSettings, settings: Settings, num_gpus: str
) -> dict[str, Any]:
    """What a replica reserves: on nodes with the label of its GPU class, anywhere where it has none.

    Raises OperatorError, which names the setting `num_gpus`, for replicas that would compute on a class's cards without
    Ray knowing of it: it gives the same card to others, and starts them by the dozen. (`tandem up` shares out its GPUs
    before, and may have none.)
    """
    actor: dict[str, Any] = {"num_cpus": own.num_cpus, "num_gpus": own.num_gpus}
    if own.gpu_class is None and not own.num_gpus:
        actor |= beside_cards(settings)
    if own.gpu_class is not None:
        label = settings.gpu_classes[own.gpu_class].label or own.gpu_class
        actor["label_selector"] = {GPU_CLASS_LABEL: label}
        if not own.num_gpus and own.device in ("auto", "cuda") and label != HERE:
            raise OperatorError(
                f"{num_gpus}: it is 0, and {own.gpu_class} is a class of GPUs; say 1, or which share of one", num_gpus
            )
    return actor


def beside_cards(settings: Settings) -> dict[str, Any]:
    """What keeps a replica without a GPU off the nodes of GPU classes, where there are others: Serve spreads replicas,
    and one on a node with a card takes CPUs that the card's own replica books, so that the card stands idle."""
    labels = sorted({each.label or name for name, each in settings.gpu_classes.items()} - {HERE})
    if not labels:
        return {}
    elsewhere = {GPU_CLASS_LABEL: f"!in({','.join(labels)})"}
    return {"label_selector": elsewhere, "fallback_strategy": [{"label_selector": {}}]}


def replicas(own: EncoderSettings) -> dict[str, Any]:
    """How many, and who gets which request. The policy's own memory steadies it, so that Serve adds no delay."""
    options: dict[str, Any] = {}
    if own.max_replicas > 1:
        options["request_router_config"] = RequestRouterConfig(request_router_class=AFFINITY)
    if own.min_replicas == own.max_replicas:
        return options | {"num_replicas": own.max_replicas}
    # A pool that may sleep starts awake: what does not work here is found out at the start, not by the first text.
    initial = {} if own.min_replicas else {"initial_replicas": 1}
    kwargs = {"target_queue_tokens": own.target_queue_tokens, "idle_s": own.idle_s}
    return options | {
        "autoscaling_config": initial
        | {
            "min_replicas": own.min_replicas,
            "max_replicas": own.max_replicas,
            "metrics_interval_s": REPORT_S,
            "look_back_period_s": WINDOW_S,
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 0.0,
            "policy": AutoscalingPolicy(policy_function=POLICY, policy_kwargs=kwargs),
        }
    }
