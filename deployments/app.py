"""The deployment graph: every deployment, its options and its bindings, in reading order.

`deployments.app:build` is the import path by which a Serve configuration (KubeRay's `serveConfigV2`) and `tandem up`
name it. Its `args` are the settings tree. No `from __future__ import annotations` here: Ray reads the annotation of
`settings` to validate `args`, and a string would make it pass an unvalidated dict.
"""

from typing import Any

from ray import serve

from deployments.diffusion import Diffusion
from deployments.ingress import Ingress
from deployments.text_encoder import TextEncoder
from serve.settings import Settings

HEALTH: dict[str, Any] = {"health_check_period_s": 5.0, "health_check_timeout_s": 10.0}


def build(settings: Settings) -> serve.Application:
    """The application for a settings tree whose Redis URLs are filled in."""
    encoder = serve.deployment(
        TextEncoder,
        autoscaling_config={
            "min_replicas": settings.encoder.min_replicas,
            "max_replicas": settings.encoder.max_replicas,
            "target_ongoing_requests": settings.encoder.max_batch_size,
        },
        max_ongoing_requests=8 * settings.encoder.max_batch_size,
        ray_actor_options={"num_cpus": settings.encoder.num_cpus, "num_gpus": settings.encoder.num_gpus},
        **HEALTH,
    ).bind(settings)

    diffusion = serve.deployment(
        Diffusion,
        num_replicas=settings.diffusion.replicas,
        ray_actor_options={"num_cpus": settings.diffusion.num_cpus, "num_gpus": settings.diffusion.num_gpus},
        graceful_shutdown_timeout_s=settings.diffusion.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        **HEALTH,
    ).bind(settings, encoder)

    return serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=settings.http.replicas,
        max_ongoing_requests=settings.http.max_connections,
        ray_actor_options={"num_cpus": settings.http.num_cpus},
        graceful_shutdown_timeout_s=5.0,
        graceful_shutdown_wait_loop_s=0.5,
        **HEALTH,
    ).bind(settings, encoder, diffusion)
