"""The queue, and what became of the jobs."""

from __future__ import annotations

from dataclasses import replace

from dashboards.panels import Dashboard, Panel, Query, Row, Variable
from dashboards.queries import (
    ARM,
    BY_ARM,
    BY_PLACE,
    DISKS,
    EVERY_JOB,
    MODEL,
    failed,
    limits,
    of,
    quantile,
    quantiles,
    rate,
    share,
    told,
    total,
)
from dashboards.shared import BACKLOG, ENDED_JOBS, JOB_TIME, QUEUE_AGE, STORE_ERRORS

JOBS = Dashboard(
    "jobs",
    "Tandem / Jobs",
    "From the order to the picture: what waits, what is in hand, how it ends.",
    [
        Row(
            "Queue",
            [
                Panel(
                    "Unfinished jobs by state",
                    "Jobs that wait (`queued`) and that a worker holds: it collects the text, draws, stores.",
                    [
                        Query(
                            total(
                                "tandem_unfinished_jobs", MODEL, by="state", inner="namespace, release, model, state"
                            ),
                            "{{state}}",
                        )
                    ],
                    width=6,
                    stacked=True,
                ),
                Panel(
                    "Waiting jobs by model",
                    "Beyond `jobs.max_queued` orders are refused.",
                    [
                        Query(
                            total(
                                "tandem_unfinished_jobs",
                                'state="queued"',
                                MODEL,
                                by="model",
                                inner="namespace, release, model",
                            ),
                            "{{model}}",
                        )
                    ],
                    width=6,
                    stacked=True,
                ),
                replace(
                    QUEUE_AGE,
                    queries=[Query(told("tandem_queue_age_seconds", MODEL, by="model"), "{{model}}")],
                    width=6,
                ),
                replace(
                    BACKLOG, queries=[Query(told("tandem_backlog_seconds", MODEL, by="model"), "{{model}}")], width=6
                ),
            ],
        ),
        Row(
            "Ends",
            [
                ENDED_JOBS,
                Panel(
                    "Failed or expired",
                    "Share of the jobs that ended. Cancelled ones are left out, and orders that can't be drawn as they "
                    "stand.",
                    [Query(failed(), "failed or expired")],
                    "percentunit",
                    limits=limits(0.01, 0.05),
                ),
                JOB_TIME,
            ],
        ),
        Row(
            "Stages",
            [
                Panel(
                    "Where a job's time goes",
                    "Seconds of each stage, on average over the jobs that succeeded; they follow one another.",
                    [
                        Query(
                            f"{rate('tandem_stage_spent_seconds_total', by='stage')} / on () group_left () "
                            f"({rate('tandem_stage_seconds_count', EVERY_JOB)} > 0)",
                            "{{stage}}",
                        )
                    ],
                    "s",
                    width=12,
                    stacked=True,
                    legend_table=True,
                ),
                Panel(
                    "Slow stages",
                    "The 95th percentile of each stage: in which one the slow jobs are slow.",
                    [Query(quantile(0.95, "tandem_stage_seconds", by="stage"), "{{stage}}")],
                    "s",
                    width=12,
                    legend_table=True,
                ),
            ],
        ),
        Row(
            "Text and results",
            [
                Panel(
                    "Wait for text",
                    "For how long claimed jobs waited for their text, which is encoded while they queue, by the "
                    "slowest tier that it came from.",
                    quantiles("tandem_text_wait_seconds", by="tier", legend="{{tier}}"),
                    "s",
                    width=6,
                ),
                Panel(
                    "Time of a put",
                    "Of one object into the result store.",
                    quantiles("tandem_result_put_seconds", by="store", legend="{{store}}"),
                    "s",
                    width=6,
                ),
                Panel(
                    "Spool",
                    "Finished images that wait for the result store, as a share of what a replica keeps; the fullest "
                    "of a placement.",
                    [
                        Query(
                            f"max by ({BY_PLACE}) ({of('tandem_spool_bytes')} / {of('tandem_spool_capacity_bytes')})",
                            "{{placement}} {{gpu_class}}",
                        )
                    ],
                    "percentunit",
                    width=6,
                    most=1,
                ),
                Panel(
                    "Webhooks",
                    "Calls per second, by what came of them; `failed` are given up.",
                    [Query(rate("tandem_webhooks_total", by="outcome"), "{{outcome}}")],
                    "reqps",
                    width=6,
                ),
            ],
        ),
        Row(
            "Templates",
            [
                Panel(
                    "Orders by template",
                    "Per second, those that name a prompt of the settings (`prompts.templates`), by its arm.",
                    [Query(rate("tandem_template_orders_total", by=ARM), BY_ARM)],
                    "reqps",
                ),
                Panel(
                    "Success by arm",
                    "Share of the jobs that ended which succeeded. A client who sees that the picture comes out wrong "
                    "cancels.",
                    [
                        Query(
                            share(
                                rate("tandem_template_jobs_total", 'state="succeeded"', by=ARM),
                                rate("tandem_template_jobs_total", by=ARM),
                            ),
                            BY_ARM,
                        )
                    ],
                    "percentunit",
                    most=1,
                ),
                Panel(
                    "Time by arm",
                    "From submission to the terminal state, the median.",
                    [Query(quantile(0.5, "tandem_template_job_seconds", by=ARM), BY_ARM)],
                    "s",
                ),
            ],
        ),
        Row(
            "Stores",
            [
                STORE_ERRORS,
                Panel(
                    "Memory of the job Redis",
                    "What counts against its `maxmemory`, and that, where it has one: there it refuses orders.",
                    [
                        Query(
                            told("tandem_job_store_memory_bytes", by="namespace, release"),
                            "{{namespace}} {{release}}",
                        ),
                        Query(
                            told("tandem_job_store_memory_limit_bytes", by="namespace, release"),
                            "{{namespace}} {{release}} at most",
                        ),
                    ],
                    "bytes",
                ),
                Panel(
                    "Free disk of Redis",
                    "Of the volumes of the chart's own Redis servers, as the kubelet sees it.",
                    [
                        Query(
                            "min by (namespace, persistentvolumeclaim) "
                            f"(kubelet_volume_stats_available_bytes{{{DISKS}}} "
                            f"/ kubelet_volume_stats_capacity_bytes{{{DISKS}}})",
                            "{{persistentvolumeclaim}}",
                        )
                    ],
                    "percentunit",
                    most=1,
                ),
            ],
        ),
    ],
    [Variable("model", "Model", f"label_values({of('tandem_unfinished_jobs')}, model)")],
)
