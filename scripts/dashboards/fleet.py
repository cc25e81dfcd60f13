"""The replicas, their cards and their speed."""

from __future__ import annotations

from dataclasses import replace

from dashboards.panels import Dashboard, Panel, Query, Row, Variable
from dashboards.queries import (
    ALLOCATED,
    BY_PLACE,
    DENOISERS,
    EACH_PLACE,
    MEMORY,
    PER,
    PLACEMENT,
    SCOPE,
    of,
    quantiles,
    rate,
    total,
)
from dashboards.shared import GPU_USE, REPLICAS
from serve.rungs import LADDER

FLEET = Dashboard(
    "fleet",
    "Tandem / Fleet",
    "The diffusion replicas, by placement and GPU class: how many, how full, how fast.",
    [
        Row(
            "Replicas",
            [
                replace(
                    REPLICAS,
                    queries=[
                        Query(
                            total("tandem_replicas", PLACEMENT, by=BY_PLACE, inner=EACH_PLACE),
                            "{{placement}} {{gpu_class}}",
                        )
                    ],
                    width=6,
                ),
                Panel(
                    "Replicas by class",
                    "Diffusion replicas that live, by GPU class, and those that there should be.",
                    [
                        Query(total("tandem_replicas", by="gpu_class", inner=EACH_PLACE), "{{gpu_class}}"),
                        Query(
                            total("tandem_replicas_wanted", by="gpu_class", inner=EACH_PLACE), "{{gpu_class}} wanted"
                        ),
                    ],
                    width=6,
                ),
                Panel(
                    "Images in hand",
                    "Images that the replicas of a placement draw or are about to.",
                    [
                        Query(
                            f"sum by ({BY_PLACE}) ({of('tandem_replica_images', PLACEMENT)})",
                            "{{placement}} {{gpu_class}}",
                        )
                    ],
                    width=6,
                    stacked=True,
                ),
                Panel(
                    "Fullness",
                    "Images in hand, as a share of what the replicas take at most.",
                    [
                        Query(
                            f"sum by ({BY_PLACE}) ({of('tandem_replica_images', PLACEMENT)}) / "
                            f"sum by ({BY_PLACE}) ({of('tandem_replica_capacity_images', PLACEMENT)})",
                            "{{placement}} {{gpu_class}}",
                        )
                    ],
                    "percentunit",
                    width=6,
                    most=1,
                ),
            ],
        ),
        Row(
            "Steps",
            [
                Panel(
                    "Image steps",
                    "Denoising steps per second, each counted for every image in it: what a placement gets done.",
                    [
                        Query(
                            rate("tandem_engine_image_steps_total", PLACEMENT, by=BY_PLACE),
                            "{{placement}} {{gpu_class}}",
                        )
                    ],
                    "cps",
                    width=6,
                    stacked=True,
                ),
                Panel(
                    "Batch occupancy",
                    "Images that share a step, on average.",
                    [
                        Query(
                            f"{rate('tandem_engine_image_steps_total', PLACEMENT, by=BY_PLACE)} / "
                            f"{rate('tandem_engine_steps_total', PLACEMENT, by=BY_PLACE)}",
                            "{{placement}} {{gpu_class}}",
                        )
                    ],
                    width=6,
                ),
                Panel(
                    "Time of a step",
                    "Of one batch.",
                    quantiles("tandem_engine_step_seconds", PLACEMENT, by="placement", legend="{{placement}}"),
                    "s",
                    width=6,
                ),
                Panel(
                    "Time of a decoding",
                    "Of one image, by the VAE.",
                    quantiles("tandem_engine_decode_seconds", PLACEMENT, by="placement", legend="{{placement}}"),
                    "s",
                    width=6,
                ),
            ],
        ),
        Row(
            "GPUs",
            [
                Panel(
                    "GPU memory of replicas by class",
                    "What the diffusion processes have allocated, now and at most so far.",
                    [
                        Query(
                            f"sum by (gpu_class, kind) ({of(MEMORY, DENOISERS, ALLOCATED, PLACEMENT)})",
                            "{{gpu_class}} {{kind}}",
                        )
                    ],
                    "bytes",
                    width=6,
                ),
                Panel(
                    "GPU memory of cards",
                    "Used by anybody, as a share of what the cards of a worker group have; as Ray's agents see it.",
                    [
                        Query(
                            f"sum by (ray_group) (ray_node_gram_used{{{SCOPE}}}) / "
                            f"(sum by (ray_group) (ray_node_gram_used{{{SCOPE}}}) + "
                            f"sum by (ray_group) (ray_node_gram_available{{{SCOPE}}}))",
                            "{{ray_group}}",
                        )
                    ],
                    "percentunit",
                    width=6,
                    most=1,
                ),
                replace(GPU_USE, width=6),
                Panel(
                    "Memory of pods",
                    "Used main memory as a share of what a pod of the worker group has; as Ray's agents see it.",
                    [
                        Query(
                            f"max by (ray_group) (ray_node_mem_used{{{SCOPE}}} / ray_node_mem_total{{{SCOPE}}})",
                            "{{ray_group}} (fullest pod)",
                        )
                    ],
                    "percentunit",
                    width=6,
                    most=1,
                ),
            ],
        ),
        Row(
            "Trouble",
            [
                Panel(
                    "Memory ladder",
                    "How far down it the lowest replica is. It goes down where memory runs out; a replica that starts "
                    "again begins where its plan says.",
                    [
                        Query(
                            f"max by ({BY_PLACE}) ({of('tandem_engine_rung', PLACEMENT)})",
                            "{{placement}} {{gpu_class}}",
                        )
                    ],
                    most=len(LADDER) - 1,
                    words={number: (rung.value, "text") for number, rung in enumerate(LADDER)},
                ),
                Panel(
                    "Out of GPU memory",
                    "How often per second there was none, by what for. It was tried again, smaller or on a lower rung.",
                    [
                        Query(
                            rate("tandem_engine_out_of_memory_total", PLACEMENT, by=f"{BY_PLACE}, phase"),
                            "{{placement}} {{gpu_class}} {{phase}}",
                        )
                    ],
                    "cps",
                ),
                Panel(
                    "Repeated decodings",
                    "Decodings per second that were not finite, and were repeated in float32.",
                    [Query(rate("tandem_vae_retries_total", PLACEMENT, by=BY_PLACE), "{{placement}} {{gpu_class}}")],
                    "cps",
                ),
                Panel(
                    "Ended for lack of memory",
                    "Processes that Ray ended per second, by pod.",
                    [
                        Query(
                            f"sum by (pod) (rate(ray_memory_manager_worker_eviction_total{{{SCOPE}}}[{PER}]))",
                            "{{pod}}",
                        )
                    ],
                    "cps",
                    width=12,
                ),
                Panel(
                    "Work beside the steps",
                    "Per second: previews that were made, predictions that `step_cache` saved.",
                    [
                        Query(rate("tandem_engine_previews_total", PLACEMENT), "previews"),
                        Query(rate("tandem_engine_reused_predictions_total", PLACEMENT), "saved predictions"),
                    ],
                    "cps",
                    width=12,
                ),
            ],
        ),
    ],
    [Variable("placement", "Placement", f"label_values({of('tandem_replicas')}, placement)")],
)
