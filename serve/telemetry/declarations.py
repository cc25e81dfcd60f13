"""Every metric of the product, declared once: name, kind, help, label names."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LONG_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 600.0)
_STAGE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 250.0, 600.0)
_ENCODE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 2.5, 5.0)
"""With the bounds that operators are alarmed at, on GPUs and on CPUs, so that neither is guessed between two others."""
_COSINE = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 1.0)
_ENCODER = ("encoder",)
_REPLICA = ("placement", "gpu_class")
_ARM = ("template", "arm")


class Kind(enum.StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Declaration:
    """One metric. `labels` are the rooms', `process` those that the carrier adds. `buckets` are the upper bounds of a
    histogram's buckets, in the metric's unit.

    A gauge that `fades` tells of what this process only hears of, such as the queue: what it has not heard of for a
    while it says nothing of. Every other gauge holds until it is set again, or the process ends.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    process: tuple[str, ...] = ()
    fades: bool = False


DECLARATIONS: tuple[Declaration, ...] = (
    Declaration("tandem_encoder_forwards_total", Kind.COUNTER, "Forward passes of a text encoder.", _ENCODER),
    Declaration(
        "tandem_encoder_forward_rows_total", Kind.COUNTER, "Rows of token ids that a text encoder computed.", _ENCODER
    ),
    Declaration(
        "tandem_encoder_dropped_rows_total",
        Kind.COUNTER,
        "Rows that nobody waited for any more when their turn came.",
        _ENCODER,
    ),
    Declaration("tandem_encoder_batch_rows", Kind.HISTOGRAM, "Rows of one encoder forward pass.", _ENCODER, _ROWS),
    Declaration(
        "tandem_encoder_forward_seconds", Kind.HISTOGRAM, "Time of one encoder forward pass.", _ENCODER, _SHORT_S
    ),
    Declaration(
        "tandem_encode_seconds", Kind.HISTOGRAM, "Time from a request at a pool to its answer.", _ENCODER, _ENCODE_S
    ),
    Declaration(
        "tandem_encoder_queue_tokens", Kind.GAUGE, "Tokens that wait for a forward pass or are in it.", _ENCODER
    ),
    Declaration(
        "tandem_text_units_total",
        Kind.COUNTER,
        "Text units of jobs and embedding requests, by where they came from and which side of the guidance reads them.",
        ("encoder", "tier", "sign"),
    ),
    Declaration(
        "tandem_text_wait_seconds",
        Kind.HISTOGRAM,
        "Time for which a claimed job waited for its text, by the slowest tier that it came from.",
        ("tier",),
        _SHORT_S,
    ),
    Declaration("tandem_cache_entries", Kind.GAUGE, "Embeddings in the memory of this process.", ("place",)),
    Declaration("tandem_cache_bytes", Kind.GAUGE, "Bytes of embeddings in the memory of this process.", ("place",)),
    Declaration("tandem_cache_errors_total", Kind.COUNTER, "Failures of the embedding cache's Redis.", ("kind",)),
    Declaration("tandem_cache_breaker_open", Kind.GAUGE, "1 while this process leaves the cache's Redis alone."),
    Declaration("tandem_prompts_total", Kind.COUNTER, "Prompts and negative prompts that were planned."),
    Declaration("tandem_truncated_prompts_total", Kind.COUNTER, "Prompts of which some text did not fit."),
    Declaration(
        "tandem_prompt_tokens_total",
        Kind.COUNTER,
        "Tokens of text: used, cut, and unknown to the vocabulary (among the used).",
        ("encoder", "kind"),
    ),
    Declaration(
        "tandem_prompt_chunks_total", Kind.COUNTER, "Rows of an encoder that prompts took, one or more each.", _ENCODER
    ),
    Declaration(
        "tandem_embedding_similarity",
        Kind.HISTOGRAM,
        "Cosine between an embedding as it is kept (int8) and as it was computed.",
        _ENCODER,
        _COSINE,
    ),
    Declaration("tandem_captions_total", Kind.COUNTER, "Pictures that were described."),
    Declaration("tandem_caption_batch_images", Kind.HISTOGRAM, "Pictures of one batch.", (), _ROWS),
    Declaration(
        "tandem_caption_seconds", Kind.HISTOGRAM, "Time from a picture at its pool to its caption.", (), _LONG_S
    ),
    Declaration(
        "tandem_device_memory_bytes",
        Kind.GAUGE,
        "Memory of a replica's GPU: allocated, peak, allowed (what its plan lets it take), total.",
        ("pool", "kind"),
        process=_REPLICA,
    ),
    Declaration(
        "tandem_device_utilization_ratio",
        Kind.GAUGE,
        "Share of time in which a replica's GPU works.",
        ("pool",),
        process=_REPLICA,
    ),
    Declaration(
        "tandem_jobs_total",
        Kind.COUNTER,
        "Jobs that reached a terminal state; `dead` (yes, no) are those that failed though nothing was wrong with the "
        "order.",
        ("state", "dead"),
    ),
    Declaration("tandem_job_seconds", Kind.HISTOGRAM, "Time from submission to the terminal state.", buckets=_LONG_S),
    Declaration(
        "tandem_template_orders_total",
        Kind.COUNTER,
        "Orders that were accepted with a template of the settings, by its arm; `arm` is empty where it has none.",
        _ARM,
    ),
    Declaration(
        "tandem_template_jobs_total",
        Kind.COUNTER,
        "Jobs with a template of the settings that reached a terminal state.",
        (*_ARM, "state"),
    ),
    Declaration(
        "tandem_template_job_seconds",
        Kind.HISTOGRAM,
        "Time from submission to the terminal state of a job with a template of the settings.",
        _ARM,
        _LONG_S,
    ),
    Declaration(
        "tandem_stage_seconds",
        Kind.HISTOGRAM,
        "Time that a job which succeeded spent in each stage, one after the other (`timings` of the API, not `told`). "
        "Of `admission` all orders that were accepted.",
        ("stage",),
        _STAGE_S,
    ),
    Declaration(
        "tandem_stage_spent_seconds_total",
        Kind.COUNTER,
        "Seconds that all jobs which succeeded spent in each stage together. Of `admission` all orders that were "
        "accepted.",
        ("stage",),
    ),
    Declaration(
        "tandem_job_store_errors_total", Kind.COUNTER, "Calls that the job store refused or did not answer in time."
    ),
    Declaration(
        "tandem_job_store_memory_bytes",
        Kind.GAUGE,
        "Memory of the job Redis that counts against its bound.",
        fades=True,
    ),
    Declaration(
        "tandem_job_store_memory_limit_bytes",
        Kind.GAUGE,
        "The bound, `maxmemory`, at which the job Redis refuses orders; not told where it has none.",
        fades=True,
    ),
    Declaration(
        "tandem_unfinished_jobs",
        Kind.GAUGE,
        "Jobs that have not ended, by state: queued, encoding, running, storing.",
        ("model", "state"),
        fades=True,
    ),
    Declaration(
        "tandem_queue_age_seconds",
        Kind.GAUGE,
        "For how long the job has waited for a worker that has waited longest; 0 where none waits.",
        ("model",),
        fades=True,
    ),
    Declaration(
        "tandem_backlog_seconds",
        Kind.GAUGE,
        "Predicted time of each replica for the work that waits.",
        ("model",),
        fades=True,
    ),
    Declaration(
        "tandem_replicas",
        Kind.GAUGE,
        "Diffusion replicas that live, by what they have told the job store.",
        ("model", "placement", "gpu_class"),
        fades=True,
    ),
    Declaration(
        "tandem_replicas_wanted",
        Kind.GAUGE,
        "Fewest diffusion replicas that there should be, by the settings.",
        ("model", "placement", "gpu_class"),
        fades=True,
    ),
    Declaration(
        "tandem_webhooks_total",
        Kind.COUNTER,
        "Calls of webhooks, by what came of them: delivered, retried (to be made again), failed (given up).",
        ("outcome",),
    ),
    Declaration(
        "tandem_spool_bytes",
        Kind.GAUGE,
        "Bytes of finished images that wait for the result store.",
        process=_REPLICA,
    ),
    Declaration(
        "tandem_spool_capacity_bytes",
        Kind.GAUGE,
        "Bytes of finished images that may wait before a replica claims no more.",
        process=_REPLICA,
    ),
    Declaration(
        "tandem_result_put_seconds",
        Kind.HISTOGRAM,
        "Time of one put into the result store that came through.",
        ("store",),
        _SHORT_S,
    ),
    Declaration("tandem_result_put_retries_total", Kind.COUNTER, "Puts made again because the result store was away."),
    Declaration("tandem_queue_depth", Kind.GAUGE, "Jobs that wait for a worker.", fades=True),
    Declaration("tandem_replica_images", Kind.GAUGE, "Images that a replica has in hand.", process=_REPLICA),
    Declaration(
        "tandem_replica_capacity_images", Kind.GAUGE, "Images that a replica takes in hand at most.", process=_REPLICA
    ),
    Declaration(
        "tandem_engine_steps_total",
        Kind.COUNTER,
        "Denoising steps, each over one batch of images.",
        process=_REPLICA,
    ),
    Declaration(
        "tandem_engine_image_steps_total",
        Kind.COUNTER,
        "Denoising steps by image: one over a batch of four counts four.",
        process=_REPLICA,
    ),
    Declaration(
        "tandem_engine_step_rows",
        Kind.HISTOGRAM,
        "Images that shared one denoising step.",
        buckets=_ROWS,
        process=_REPLICA,
    ),
    Declaration(
        "tandem_engine_step_seconds",
        Kind.HISTOGRAM,
        "Time of one denoising step.",
        buckets=_SHORT_S,
        process=_REPLICA,
    ),
    Declaration(
        "tandem_engine_decode_seconds",
        Kind.HISTOGRAM,
        "Time of one image's decoding by the VAE.",
        buckets=_SHORT_S,
        process=_REPLICA,
    ),
    Declaration(
        "tandem_engine_previews_total",
        Kind.COUNTER,
        "Previews of unfinished images that were made.",
        process=_REPLICA,
    ),
    Declaration(
        "tandem_engine_reused_predictions_total",
        Kind.COUNTER,
        "Predictions of the denoiser that a step took from the step before (`step_cache`).",
        process=_REPLICA,
    ),
    Declaration(
        "tandem_engine_out_of_memory_total",
        Kind.COUNTER,
        "How often the device had no memory, by what for (`begin` an image, `encode`, `step`, `decode`, `load` the "
        "model) and the rung of the memory ladder on which it was.",
        ("phase", "rung"),
        process=_REPLICA,
    ),
    Declaration(
        "tandem_engine_rung",
        Kind.GAUGE,
        "Where a replica is on the memory ladder: 0 resident, 1 vae_slicing, 2 vae_tiling, 3 attention_slicing, "
        "4 int8, 5 int4, 6 offload, 7 sequential_offload, 8 cpu.",
        process=_REPLICA,
    ),
    Declaration(
        "tandem_vae_retries_total",
        Kind.COUNTER,
        "Decodings repeated in float32 because the first was not finite.",
        process=_REPLICA,
    ),
)

BY_NAME = {declaration.name: declaration for declaration in DECLARATIONS}


def declared(name: str, kind: Kind, labels: Sequence[str]) -> Declaration:
    """The declaration of `name`. ValueError where the name is unknown, or kind or labels differ from it."""
    declaration = BY_NAME.get(name)
    if declaration is None:
        raise ValueError(f"metric {name} is not declared in serve/telemetry/declarations.py")
    if declaration.kind is not kind:
        raise ValueError(f"metric {name} is a {declaration.kind}, not a {kind}")
    if set(labels) != set(declaration.labels):
        raise ValueError(f"metric {name} takes the labels {declaration.labels}, not {tuple(labels)}")
    return declaration


def process_labels(process: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What a carrier adds to each metric's labels, by the metric's name: empty where nobody has told it."""
    return {each.name: {label: process.get(label, "") for label in each.process} for each in DECLARATIONS}
