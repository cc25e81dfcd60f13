"""What Prometheus finds on the page of a node's agent, against what is declared: names, labels, and that gauges stay.

tests/chart holds alerts and dashboards to the same declarations.
"""

import time
from collections.abc import Iterator, Mapping

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.orders import finished, submit
from support.promql import OURS, RAYS
from support.server import Server, wait_until

from serve.jobs.base import REPORT_LIFE_S

pytestmark = pytest.mark.cluster

RAYS_OWN = {
    "Component", "NodeAddress", "SessionName", "Version", "WorkerId", "JobId",
    "otel_scope_name", "otel_scope_version", "otel_scope_schema_url",
}  # fmt: skip
"""Labels that Ray puts on."""
SELDOM = {
    # where something goes wrong
    "ray_tandem_cache_errors_total",
    "ray_tandem_encoder_dropped_rows_total",
    "ray_tandem_engine_out_of_memory_total",
    "ray_tandem_job_store_errors_total",
    "ray_tandem_result_put_retries_total",
    "ray_tandem_vae_retries_total",
    "ray_memory_manager_worker_eviction_total",
    # where the job Redis has a `maxmemory`
    "ray_tandem_job_store_memory_limit_bytes",
    # where it is asked for
    "ray_tandem_embedding_similarity_bucket",
    "ray_tandem_embedding_similarity_count",
    "ray_tandem_engine_previews_total",
    "ray_tandem_engine_reused_predictions_total",
    "ray_tandem_webhooks_total",
    # where the settings have a model that describes pictures
    "ray_tandem_captions_total",
    "ray_tandem_caption_batch_images_bucket",
    "ray_tandem_caption_batch_images_count",
    "ray_tandem_caption_seconds_bucket",
    "ray_tandem_caption_seconds_count",
    # where they have templates
    "ray_tandem_template_orders_total",
    "ray_tandem_template_jobs_total",
    "ray_tandem_template_job_seconds_bucket",
    "ray_tandem_template_job_seconds_count",
    # on GPUs
    "ray_tandem_device_memory_bytes",
    "ray_tandem_device_utilization_ratio",
    "ray_node_gram_used",
    "ray_node_gram_available",
}
"""What a healthy server without a GPU does not tell."""
EXPORTED_S = 60.0
AGENT_KEEPS_S = 35.0
"""Longer than Ray shows a gauge that is not told again: an export (10 s) and twice that."""


def samples(server: Server) -> Iterator[tuple[str, Mapping[str, str], float]]:
    text = httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def names(server: Server) -> set[str]:
    return {name for name, _, _ in samples(server)}


@pytest.fixture
def busy(server: Server, http: httpx.Client) -> Server:
    """A server that has drawn, and cut a prompt, and has told of both."""
    job = finished(
        http,
        submit(
            http, "a red circle on a blue background " * 30, num_images=2, negative_prompt="green", long_prompt="head"
        ),
    )
    assert job["state"] == "succeeded"
    missing = {*OURS, *RAYS} - SELDOM
    deadline = time.monotonic() + EXPORTED_S
    while missing := missing - names(server):
        assert time.monotonic() < deadline, f"Ray has not exported {sorted(missing)}"
        time.sleep(0.5)
    return server


def test_ray_exports_what_is_declared_under_the_names_that_alerts_and_dashboards_use(busy: Server) -> None:
    found = {name for name in names(busy) if name.startswith("ray_tandem_")}
    sums = {name.replace("_count", "_sum") for name in OURS if name.endswith("_count")}
    assert found <= OURS.keys() | sums
    assert (OURS.keys() - SELDOM) <= found


def test_the_labels_are_those_that_are_declared_and_rays_own(busy: Server) -> None:
    for name, labels, _ in samples(busy):
        if name in OURS:
            assert labels.keys() - RAYS_OWN == OURS[name], name
            assert "WorkerId" in labels, "two replicas of a node are two series"
        elif name in RAYS:
            assert labels.keys() >= RAYS[name], name


def test_a_replica_is_told_by_its_placement_and_node(busy: Server) -> None:
    told = {
        (labels["placement"], labels["gpu_class"]): value
        for name, labels, value in samples(busy)
        if name == "ray_tandem_engine_image_steps_total"
    }
    assert list(told) == [("shapes", "")], "by the settings, which have no class, whatever label the node has"
    assert next(iter(told.values())) > 0
    only = {("shapes", "shapes", ""): 1}
    assert counted(busy, "ray_tandem_replicas_wanted") == only
    wait_until(
        lambda: counted(busy, "ray_tandem_replicas") == only,
        REPORT_LIFE_S + EXPORTED_S,
        "a replica that an earlier test has killed to be forgotten",
    )


def counted(server: Server, gauge: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(labels[label] for label in ("model", "placement", "gpu_class")): value
        for name, labels, value in samples(server)
        if name == gauge
    }


@pytest.mark.slow
def test_a_gauge_that_was_set_once_stays(busy: Server) -> None:
    """Ray tells of a gauge once for each time that it is set."""
    began = time.monotonic()
    gone: list[str] = []

    def long_enough() -> bool:
        found = names(busy)
        gone.extend({"ray_tandem_spool_capacity_bytes", "ray_tandem_cache_breaker_open"} - found)
        return bool(gone) or time.monotonic() - began > AGENT_KEEPS_S

    wait_until(long_enough, AGENT_KEEPS_S + 10, "time to pass")
    assert not gone
