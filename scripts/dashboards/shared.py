"""Panels that stand on two boards."""

from __future__ import annotations

from dashboards.panels import Panel, Query
from dashboards.queries import BY_PLACE, EACH_PLACE, TEXT, hit_share, limits, of, quantiles, rate, told, total

ENDED_JOBS = Panel(
    "Ended jobs",
    "Jobs that reached a terminal state, per second. Dead letters are those that failed though nothing was wrong with "
    "the order.",
    [
        Query(rate("tandem_jobs_total", 'dead="no"', by="state"), "{{state}}"),
        Query(rate("tandem_jobs_total", 'dead="yes"'), "dead letters"),
    ],
    "reqps",
    stacked=True,
)
JOB_TIME = Panel(
    "Time of a job",
    "From submission to the terminal state, waiting included.",
    quantiles("tandem_job_seconds"),
    "s",
)
QUEUE_AGE = Panel(
    "Oldest waiting job",
    "For how long the job has waited that has waited longest, by model, over the chosen releases.",
    [Query(told("tandem_queue_age_seconds", by="model"), "{{model}}")],
    "s",
    limits=limits(60, 120),
)
BACKLOG = Panel(
    "Backlog",
    "Predicted seconds of work that wait before each replica, by model, of the release that has most. Beyond "
    "`jobs.max_queued_s` orders are refused.",
    [Query(told("tandem_backlog_seconds", by="model"), "{{model}}")],
    "s",
    limits=limits(150, 300),
)
REPLICAS = Panel(
    "Diffusion replicas",
    "Those that have spoken to the job store within half a minute, by placement and GPU class.",
    [Query(total("tandem_replicas", by=BY_PLACE, inner=EACH_PLACE), "{{placement}} {{gpu_class}}")],
    stacked=True,
)
HIT_SIGN = Panel(
    "Cache hits by sign",
    "Share of text units that no encoder had to compute, by which side of the guidance reads them. `empty`, which all "
    "share, is left out.",
    [Query(hit_share(TEXT, by="sign"), "{{sign}}"), Query(hit_share(TEXT), "all")],
    "percentunit",
    most=1,
)
GPU_USE = Panel(
    "GPU utilisation by class",
    "Share of time in which the cards work for anybody, averaged over the replicas of a class.",
    [
        Query(
            f"avg by (gpu_class, pool) ({of('tandem_device_utilization_ratio')})",
            "{{gpu_class}} {{pool}}",
        )
    ],
    "percentunit",
    most=1,
)
STORE_ERRORS = Panel(
    "Errors of the stores",
    "Calls per second that failed: of the job Redis, of the cache Redis by kind, puts into the bucket made again.",
    [
        Query(rate("tandem_job_store_errors_total"), "job Redis"),
        Query(rate("tandem_cache_errors_total", by="kind"), "cache Redis: {{kind}}"),
        Query(rate("tandem_result_put_retries_total"), "bucket"),
    ],
    "reqps",
)
