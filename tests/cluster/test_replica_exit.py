"""A replica's process that somebody tells to end, without telling Serve."""

import os
import signal

import httpx
import psutil
import pytest
from support.orders import finished, submit
from support.server import Server, running, wait_until

pytestmark = pytest.mark.cluster


@pytest.mark.slow
def test_a_replica_that_gets_a_sigterm_gives_its_job_back(http: httpx.Client, server: Server) -> None:
    """At once, and the attempt does not count: one whose lease had run out would be at its second."""
    job_id = submit(http, "a white star on a red background", seed=5, num_inference_steps=150, num_images=8)
    wait_until(lambda: http.get(f"/v1/jobs/{job_id}").json()["step"] >= 2, 60, "the job to be under way")
    (victim,) = server.replica_pids("Diffusion")
    os.kill(victim, signal.SIGTERM)
    wait_until(lambda: victim not in server.replica_pids("Diffusion"), 20, "the replica to end")
    job = finished(http, job_id)
    assert (job["state"], job["attempt"], len(job["images"])) == ("succeeded", 1, 8)


def test_the_server_ends_with_its_raylet(server: Server) -> None:
    """The last one here. The replicas outlive a raylet whose parent has not yet buried it, and nobody answers then."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    (raylet,) = [process for process in family if process.name() == "raylet"]
    raylet.kill()
    assert server.process.wait(60) == 2
    wait_until(lambda: not any(map(running, family)), 30, "all that it started to end")
