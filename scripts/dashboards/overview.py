"""The first board that one looks at."""

from __future__ import annotations

from dashboards.panels import Dashboard, Panel, Query, Row
from dashboards.queries import (
    EACH_PLACE,
    NOW,
    PER,
    SCOPE,
    STATES,
    answered,
    failed,
    limits,
    quantile,
    quantiles,
    rate,
    share,
    stat,
    told,
    total,
)
from dashboards.shared import BACKLOG, ENDED_JOBS, GPU_USE, HIT_SIGN, JOB_TIME, QUEUE_AGE, REPLICAS, STORE_ERRORS

OVERVIEW = Dashboard(
    "overview",
    "Tandem / Overview",
    "Is Tandem well, and how much does it do?",
    [
        Row(
            "Now",
            [
                stat(
                    "Application",
                    "Whether Serve runs the application: of the chosen releases, the one that is worst off. While it "
                    "deploys, the replicas that are there go on serving.",
                    f"min (max by (namespace, release) (ray_serve_application_status{{{SCOPE}}}))",
                    "none",
                    nothing="not heard of",
                    words=STATES,
                ),
                stat(
                    "Jobs done",
                    "Succeeded jobs a minute, over 15 minutes.",
                    "60 * " + rate("tandem_jobs_total", 'state="succeeded"', over=NOW),
                    "suffix: /min",
                    nothing="none",
                ),
                stat(
                    "Failed or expired",
                    "Share of the jobs of 15 minutes that expired, or failed though nothing was wrong with the order. "
                    "Cancelled ones are left out, and orders that can't be drawn as they stand.",
                    failed(NOW),
                    "percentunit",
                    limits=limits(0.01, 0.05),
                    nothing="none ended",
                ),
                stat(
                    "5xx",
                    "Share of the HTTP requests of 15 minutes that were answered with 5xx. 503 is a full queue too.",
                    share(
                        answered('application!=""', 'status_code=~"5.."', over=NOW),
                        answered('application!=""', over=NOW),
                    ),
                    "percentunit",
                    limits=limits(0.01, 0.05),
                    nothing="no request",
                ),
                stat(
                    "Oldest waiting job",
                    "Over all models.",
                    told("tandem_queue_age_seconds"),
                    "s",
                    limits=limits(60, 120),
                ),
                stat(
                    "Backlog",
                    "Predicted work before each replica, of the model that has most.",
                    told("tandem_backlog_seconds"),
                    "s",
                    limits=limits(150, 300),
                ),
                Panel(
                    "Diffusion replicas",
                    "Those that live, and those that there should be.",
                    [
                        Query(total("tandem_replicas", inner=EACH_PLACE), "present", instant=True),
                        Query(total("tandem_replicas_wanted", inner=EACH_PLACE), "wanted", instant=True),
                    ],
                    kind="stat",
                    width=4,
                    height=6,
                    nothing="not heard of",
                ),
                stat(
                    "P99 of encoding",
                    "Of the requests of 15 minutes to the text encoders' pools. On CPUs ten times as much is usual.",
                    f"{quantile(0.99, 'tandem_encode_seconds', over=NOW)} >= 0",
                    "s",
                    height=6,
                    limits=limits(0.1, 0.2),
                    nothing="no text",
                ),
                Panel(
                    "Alerts",
                    "Those of Tandem that fire, where this Prometheus evaluates the rules.",
                    [
                        Query(
                            "max by (severity, alertname, namespace, release) "
                            f'(ALERTS{{{SCOPE}, alertname=~"Tandem.*", alertstate="firing"}})',
                            "",
                            instant=True,
                        )
                    ],
                    "none",
                    kind="table",
                    width=16,
                    height=6,
                    nothing="none fires",
                ),
            ],
        ),
        Row("Jobs", [ENDED_JOBS, JOB_TIME, QUEUE_AGE]),
        Row(
            "Text",
            [
                Panel("Encode latency", "Of requests to all pools.", quantiles("tandem_encode_seconds"), "s"),
                Panel(
                    "Prompts",
                    "Prompts and negative prompts that were planned, per second, and those of which something was cut.",
                    [
                        Query(rate("tandem_prompts_total"), "planned"),
                        Query(rate("tandem_truncated_prompts_total"), "truncated"),
                    ],
                    "reqps",
                ),
                HIT_SIGN,
            ],
        ),
        Row("Fleet", [REPLICAS, BACKLOG, GPU_USE]),
        Row(
            "HTTP and stores",
            [
                Panel(
                    "Requests",
                    "HTTP requests per second at Serve's proxies, by status.",
                    [
                        Query(answered(by="status_code"), "{{status_code}}"),
                    ],
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Latency of requests",
                    "At Serve's proxies. Orders that wait for the picture, and event streams, last as long as that.",
                    [
                        Query(
                            f"histogram_quantile({q}, sum by (le) "
                            f"(rate(ray_serve_http_request_latency_ms_bucket{{{SCOPE}}}[{PER}])))",
                            f"P{q * 100:.0f}",
                        )
                        for q in (0.5, 0.95, 0.99)
                    ],
                    "ms",
                ),
                STORE_ERRORS,
            ],
        ),
    ],
)
