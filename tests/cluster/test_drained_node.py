"""A node that is to go, and says so to Ray first (`ray drain-node`, which the chart's pods do before they end)."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import ray
import redis
from pydantic import SecretStr
from ray import serve
from support.nodes import labelled_nodes
from support.orders import finished, submit
from support.server import free_port, ready, wait_until

from deployments.app import application
from serve.embedded import EmbeddedRedis
from serve.settings.tree import Settings

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

START_S = 120.0


@dataclass(frozen=True)
class Fleet:
    """One replica that draws, on one of two nodes of its class."""

    url: str
    jobs: "redis.Redis[bytes]"

    def node(self, job_id: str) -> str:
        """Where the job is drawn, once it was claimed: a worker's name begins with its node."""
        worker = self.jobs.hget(f"tandem:job:{job_id}", "worker") or b""
        return worker.decode().partition(":")[0]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    home = tmp_path_factory.mktemp("drained")
    port = free_port()
    with (
        EmbeddedRedis(home, "jobs") as jobs,
        EmbeddedRedis(home, "cache", 64 * 1024 * 1024) as cache,
        labelled_nodes(["4gb", "4gb"]),
    ):
        settings = Settings(
            data_dir=home,
            jobs={"redis_url": SecretStr(jobs.url)},
            keys={"required": False},
            cache={"redis_url": SecretStr(cache.url)},
            gpu_classes={"4gb": {"memory_gb": 4}},
            diffusion={"device": "cpu", "num_gpus": 1, "gpu_class": "4gb", "torch_threads": 1, "profile_s": 0},
        )
        quiet = {"log_level": "WARNING"}
        serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"}, logging_config=quiet)
        serve.run(application(settings), name="tandem", route_prefix="/", logging_config=quiet)
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: ready(url), START_S, "the server")
        yield Fleet(url, redis.Redis.from_url(jobs.url))
        serve.shutdown()


LARGE = {"width": 256, "height": 256}
"""So that the job takes longer than the command that drains needs to import Ray."""


def drain(node: str) -> None:
    """As the pods of the chart are told to."""
    where = ("--address", ray.get_runtime_context().gcs_address, "--node-id", node)
    why = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test")
    command = (sys.executable, "-m", "ray.scripts.scripts", "drain-node", *where, *why)
    subprocess.run([*command, "--deadline-remaining-seconds", "180"], check=True, capture_output=True, timeout=60)


def test_what_is_drawn_on_a_node_that_goes_is_finished_and_the_next_is_drawn_elsewhere(fleet: Fleet) -> None:
    with httpx.Client(base_url=fleet.url, timeout=120) as http:
        last = submit(http, "a white star on a red background", seed=5, num_inference_steps=150, num_images=8, **LARGE)
        wait_until(lambda: http.get(f"/v1/jobs/{last}").json()["step"] >= 2, 60, "the job to be under way")
        leaving = fleet.node(last)
        drain(leaving)
        assert http.get(f"/v1/jobs/{last}").json()["state"] == "running", "there is something to finish"
        job = finished(http, last)
        assert (job["state"], job["attempt"], len(job["images"])) == ("succeeded", 1, 8)
        assert fleet.node(last) == leaving

        def gone() -> bool:
            return not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == leaving)

        wait_until(gone, 60, "the drained node to end by itself")
        job = finished(http, following := submit(http, "a red circle on a blue background", seed=1))
        assert (job["state"], job["attempt"]) == ("succeeded", 1)
        assert fleet.node(following) != leaving
