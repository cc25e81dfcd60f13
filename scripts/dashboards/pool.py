"""Text encoders and their cache."""

from __future__ import annotations

from dataclasses import replace

from dashboards.panels import Dashboard, Panel, Query, Row, Variable
from dashboards.queries import (
    ALLOCATED,
    ENCODER,
    ENCODERS,
    MEMORY,
    SCOPE,
    TEXT,
    UNITS,
    hit_share,
    limits,
    of,
    quantile,
    quantiles,
    rate,
    share,
)
from dashboards.shared import GPU_USE, HIT_SIGN

POOL = Dashboard(
    "encoder-pool",
    "Tandem / Encoder pool",
    "Text in, embeddings out: latency, batches, the cache, and what becomes of the text.",
    [
        Row(
            "Latency",
            [
                Panel(
                    "Encode latency",
                    "From a request at a pool to its answer, cached text included.",
                    quantiles("tandem_encode_seconds", ENCODER, by="encoder", legend="{{encoder}}"),
                    "s",
                    width=12,
                    limits=limits(0.1, 0.2),
                    legend_table=True,
                ),
                Panel(
                    "Time of a forward pass",
                    "Of one batch of rows.",
                    quantiles("tandem_encoder_forward_seconds", ENCODER, by="encoder", legend="{{encoder}}"),
                    "s",
                    width=12,
                    legend_table=True,
                ),
            ],
        ),
        Row(
            "Load",
            [
                Panel(
                    "Requests",
                    "Requests to a pool per second.",
                    [Query(rate("tandem_encode_seconds_count", ENCODER, by="encoder"), "{{encoder}}")],
                    "reqps",
                    width=6,
                ),
                Panel(
                    "Tokens that wait",
                    "Tokens that wait for a forward pass or are in it, over all replicas: what a pool scales on.",
                    [Query(f"sum by (encoder) ({of('tandem_encoder_queue_tokens', ENCODER)})", "{{encoder}}")],
                    width=6,
                ),
                Panel(
                    "Batch occupancy",
                    "Rows of a forward pass, on average.",
                    [
                        Query(
                            f"{rate('tandem_encoder_forward_rows_total', ENCODER, by='encoder')} / "
                            f"{rate('tandem_encoder_forwards_total', ENCODER, by='encoder')}",
                            "{{encoder}}",
                        )
                    ],
                    width=6,
                ),
                Panel(
                    "Replicas",
                    "Healthy replicas of the pools, as Serve counts them.",
                    [
                        Query(
                            "sum by (deployment) (ray_serve_deployment_replica_healthy"
                            f'{{{SCOPE}, deployment=~"TextEncoder-.*"}})',
                            "{{deployment}}",
                        )
                    ],
                    width=6,
                ),
            ],
        ),
        Row(
            "Cache",
            [
                Panel(
                    "Text by where it came from",
                    "Units of text per second: from a process's memory, from Redis, or encoded. `empty` is left out.",
                    [Query(rate(UNITS, TEXT, ENCODER, by="tier"), "{{tier}}")],
                    "cps",
                    stacked=True,
                ),
                Panel(
                    "Cache hits by tier",
                    "Share of the units of text that each tier answered.",
                    [
                        Query(
                            f"{rate(UNITS, TEXT, ENCODER, by='tier')} "
                            f"/ on () group_left () {rate(UNITS, TEXT, ENCODER)}",
                            "{{tier}}",
                        )
                    ],
                    "percentunit",
                    stacked=True,
                    most=1,
                ),
                replace(
                    HIT_SIGN,
                    queries=[
                        Query(hit_share(TEXT, ENCODER, by="sign"), "{{sign}}"),
                        Query(hit_share(TEXT, ENCODER), "all"),
                    ],
                ),
                Panel(
                    "Embeddings in memory",
                    "Bytes of embeddings in the memory of the processes, by their kind.",
                    [Query(f"sum by (place) ({of('tandem_cache_bytes')})", "{{place}}")],
                    "bytes",
                    width=6,
                ),
                Panel(
                    "Entries in memory",
                    "Embeddings in the memory of the processes, by their kind.",
                    [Query(f"sum by (place) ({of('tandem_cache_entries')})", "{{place}}")],
                    width=6,
                ),
                Panel(
                    "Errors of the cache Redis",
                    "Failures per second, by kind.",
                    [Query(rate("tandem_cache_errors_total", by="kind"), "{{kind}}")],
                    "reqps",
                    width=6,
                ),
                Panel(
                    "Processes without the cache Redis",
                    "How many processes leave it alone at the moment, because it failed.",
                    [Query(f"sum ({of('tandem_cache_breaker_open')})", "processes")],
                    width=6,
                ),
            ],
        ),
        Row(
            "Text",
            [
                Panel(
                    "Truncation rate",
                    "Share of the prompts of which some text did not fit.",
                    [Query(share(rate("tandem_truncated_prompts_total"), rate("tandem_prompts_total")), "truncated")],
                    "percentunit",
                    width=6,
                ),
                Panel(
                    "Token coverage",
                    "Share of the used tokens that the vocabulary knows.",
                    [
                        Query(
                            "1 - "
                            + share(
                                rate("tandem_prompt_tokens_total", 'kind="unknown"', ENCODER, by="encoder"),
                                rate("tandem_prompt_tokens_total", 'kind="used"', ENCODER, by="encoder"),
                            ),
                            "{{encoder}}",
                        )
                    ],
                    "percentunit",
                    width=6,
                    most=1,
                ),
                Panel(
                    "Tokens",
                    "Tokens of text per second: used, and cut because they did not fit; and the rows that they take.",
                    [
                        Query(
                            rate("tandem_prompt_tokens_total", 'kind=~"used|cut"', ENCODER, by="encoder, kind"),
                            "{{encoder}} {{kind}}",
                        ),
                        Query(rate("tandem_prompt_chunks_total", ENCODER, by="encoder"), "{{encoder}} rows"),
                    ],
                    "cps",
                    width=6,
                ),
                Panel(
                    "Embedding similarity",
                    "Cosine between an embedding as it is kept and as it was computed, with `cache.values: int8`: the "
                    "lowest of a hundred, and the median.",
                    [
                        Query(
                            quantile(q, "tandem_embedding_similarity", ENCODER, by="encoder"),
                            f"{{{{encoder}}}} P{q * 100:.0f}",
                        )
                        for q in (0.01, 0.5)
                    ],
                    "none",
                    width=6,
                    least=None,
                    most=1,
                    usual=0.9,
                ),
            ],
        ),
        Row(
            "Captions",
            [
                Panel(
                    "Time of a caption",
                    "From a picture at its pool to its caption.",
                    quantiles("tandem_caption_seconds"),
                    "s",
                ),
                Panel(
                    "Captions",
                    "Pictures that were described per second.",
                    [Query(rate("tandem_captions_total"), "captions")],
                    "cps",
                ),
                Panel(
                    "Pictures of a batch",
                    "That were described together: the median, and most of a hundred batches.",
                    [Query(quantile(q, "tandem_caption_batch_images"), f"P{q * 100:.0f}") for q in (0.5, 0.99)],
                ),
            ],
        ),
        Row(
            "GPUs",
            [
                Panel(
                    "GPU memory",
                    "Of the text encoders' processes, by class: allocated now, and at most so far.",
                    [
                        Query(
                            f"sum by (gpu_class, kind) ({of(MEMORY, ENCODERS, ALLOCATED)})",
                            "{{gpu_class}} {{kind}}",
                        )
                    ],
                    "bytes",
                ),
                replace(
                    GPU_USE,
                    queries=[
                        Query(
                            f"avg by (gpu_class) ({of('tandem_device_utilization_ratio', ENCODERS)})",
                            "{{gpu_class}}",
                        )
                    ],
                ),
                Panel(
                    "Rows that nobody waited for",
                    "Rows per second that were dropped because their clients had gone.",
                    [Query(rate("tandem_encoder_dropped_rows_total", ENCODER, by="encoder"), "{{encoder}}")],
                    "cps",
                ),
            ],
        ),
    ],
    [Variable("encoder", "Encoder", f"label_values({of('tandem_encoder_queue_tokens')}, encoder)")],
)
