"""Two GPU classes draw one model on a Ray cluster of several nodes: every job runs where it fits, nobody idles beside a
queue, and whoever hangs up frees what was drawn for them.

The GPUs are pretended: Ray counts them, and the replicas compute on the CPU.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection

import httpx
import pytest
import redis
from pydantic import SecretStr
from ray import serve
from ray.exceptions import RayTaskError
from support.nodes import labelled_nodes
from support.orders import finished, submit
from support.server import free_port, ready, wait_until

from deployments.app import application
from serve.embedded import EmbeddedRedis
from serve.relief import AGED_S
from serve.service import Busy
from serve.settings.tree import Settings

pytestmark = [pytest.mark.cluster, pytest.mark.slow]  # test_executed_chart.py has the story

SMALL, LARGE = 128, 192
"""Sides of images: the small card holds no more than the smaller one."""
START_S = 120.0
CLAIMED_WITHIN_S = 1.0


@dataclass(frozen=True)
class Mixed:
    """A server on two classes of nodes; `classes` by node id."""

    url: str
    classes: dict[str, str]
    jobs: "redis.Redis[bytes]"

    def replica(self, job_id: str) -> str:
        """The node that drew the job, where there is one replica: a worker's name begins with its node."""
        worker = self.jobs.hget(f"tandem:job:{job_id}", "worker")
        assert isinstance(worker, bytes)
        return worker.decode().partition(":")[0]

    def ran_on(self, job_id: str) -> str:
        """The class of that node."""
        return self.classes[self.replica(job_id)]

    def step(self, key: bytes) -> int:
        """Steps made of the job whose record is at `key`."""
        return int(self.jobs.hget(key, "step") or 0)

    def in_hand(self) -> dict[str, str]:
        """What one replica of each placement says of itself."""
        pools = httpx.get(f"{self.url}/readyz", timeout=10).json()["pools"]
        return {name: pool["detail"] for name, pool in pools.items() if name.startswith("diffusion")}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mixed]:
    home = tmp_path_factory.mktemp("mixed")
    port = free_port()
    with (
        EmbeddedRedis(home, "jobs") as jobs,
        EmbeddedRedis(home, "cache", 64 * 1024 * 1024) as cache,
        labelled_nodes(["4gb", "11gb", "11gb"]) as classes,
    ):
        settings = Settings(
            data_dir=home,
            http={"port": port, "benchmark": True},
            jobs={"redis_url": SecretStr(jobs.url)},
            keys={"required": False},
            cache={"redis_url": SecretStr(cache.url)},
            gpu_classes={"4gb": {"memory_gb": 4}, "11gb": {"memory_gb": 11}},
            diffusion={
                "device": "cpu",
                "num_cpus": 0.5,
                "num_gpus": 1,
                "torch_threads": 1,
                "max_batch_size": 2,
                "max_rows": 2,
                "profile_s": 0,
            },
            placements={
                "small": {"gpu_class": "4gb", "max_pixels": SMALL * SMALL},
                "large": {"gpu_class": "11gb", "max_pixels": LARGE * LARGE, "replicas": 2},
            },
        )
        quiet = {"log_level": "WARNING"}
        http = {"host": "127.0.0.1", "port": port, "location": "HeadOnly"}
        serve.start(http_options=http, logging_config=quiet)
        serve.run(application(settings), name="tandem", route_prefix="/", logging_config=quiet)
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: ready(url), START_S, "the server")
        yield Mixed(url, classes, redis.Redis.from_url(jobs.url))
        serve.shutdown()


@pytest.fixture
def http(mixed: Mixed) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=mixed.url, timeout=120) as client:
        yield client


def order(http: httpx.Client, side: int, number: int, steps: int = 8) -> str:
    prompt = f"a red circle on a blue background, number {number}"
    return submit(http, prompt, width=side, height=side, num_inference_steps=steps, seed=number)


def idle_beside(jobs: list[dict], spans: list[tuple[float, float]]) -> float:
    """Seconds in which a replica that was busy in these spans held nothing, and one of these jobs, which it could have
    drawn, had waited for more than CLAIMED_WITHIN_S."""
    waits = [(job["created_at"] + CLAIMED_WITHIN_S, job["started_at"]) for job in jobs]
    edges = sorted({edge for span in (*spans, *waits) for edge in span})
    return sum(
        until - since
        for since, until in itertools.pairwise(edges)
        if any(start <= since and until <= end for start, end in waits)
        and not any(start <= since and until <= end for start, end in spans)
    )


def test_every_job_runs_where_it_fits_and_no_replica_idles(mixed: Mixed, http: httpx.Client) -> None:
    sides = [LARGE if number % 2 == 0 else SMALL for number in range(30)]
    ids = [order(http, side, number) for number, side in enumerate(sides)]
    jobs = [finished(http, job_id) for job_id in ids]
    assert [job["state"] for job in jobs] == ["succeeded"] * len(jobs)
    ran = [(job, side, mixed.ran_on(job["id"])) for job, side in zip(jobs, sides, strict=True)]

    assert {where for _, side, where in ran if side == LARGE} == {"11gb"}
    assert {where for _, side, where in ran if side == SMALL} == {"4gb", "11gb"}, "the large card helps out"

    # What only the large card holds goes first there: while such a job waits, it claims no other.
    waits = [(job["created_at"], job["started_at"]) for job, side, _ in ran if side == LARGE]
    for job, side, where in ran:
        if side == SMALL and where == "11gb" and job["started_at"] - job["created_at"] < AGED_S:
            assert not any(created < job["started_at"] < started for created, started in waits)

    # And none idles beside a job that it holds: the second large card neither.
    for node, gpu_class in mixed.classes.items():
        spans = [(job["started_at"], job["finished_at"]) for job in jobs if mixed.replica(job["id"]) == node]
        assert spans, f"{gpu_class} drew nothing"
        claimable = [job for job, side, _ in ran if side == SMALL or gpu_class == "11gb"]
        assert idle_beside(claimable, spans) < 0.5, (gpu_class, spans)


def test_the_large_card_takes_small_work_rather_than_none(mixed: Mixed, http: httpx.Client) -> None:
    ids = [order(http, SMALL, 100 + number) for number in range(8)]
    assert {finished(http, job_id)["state"] for job_id in ids} == {"succeeded"}
    assert {mixed.ran_on(job_id) for job_id in ids} == {"4gb", "11gb"}


def test_what_nobody_holds_is_refused_at_the_door(http: httpx.Client) -> None:
    answer = http.post("/v1/jobs", json={"prompt": "x", "width": 256, "height": 256})
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["param"] == "width"
    assert f"{LARGE} x {LARGE}" in error["message"]


def test_who_hangs_up_cancels_and_frees_the_rows(mixed: Mixed, http: httpx.Client) -> None:
    """Through Serve's proxy, as a closed browser tab does it."""
    order = {"prompt": "a green star", "width": LARGE, "height": LARGE, "num_images": 8, "num_inference_steps": 150}
    known = set(mixed.jobs.keys("tandem:job:*"))
    caller = HTTPConnection(str(http.base_url.host), http.base_url.port)
    caller.request("POST", "/v1/jobs?wait=true", json.dumps(order), {"Content-Type": "application/json"})
    wait_until(lambda: set(mixed.jobs.keys("tandem:job:*")) > known, 20, "the job to be logged")
    (key,) = set(mixed.jobs.keys("tandem:job:*")) - known
    wait_until(lambda: mixed.step(key) >= 1, 60, "the job to be under way")
    wait_until(lambda: "8 images in hand" in mixed.in_hand().values(), 20, "the replica that draws it to be asked")
    hung_up_at = mixed.step(key)
    caller.close()
    job = finished(http, key.decode().rpartition(":")[2])
    assert job["state"] == "cancelled"
    assert job["step"] <= hung_up_at + 10
    told = (mixed.in_hand() for _ in range(1000))  # either of the large replicas is asked each time
    wait_until(lambda: all(set(next(told).values()) == {"0 images in hand"} for _ in range(8)), 20, "the free rows")


def test_the_self_test_measures_every_placement(http: httpx.Client) -> None:
    small = http.post("/v1/benchmark", json={"width": SMALL, "height": SMALL, "num_inference_steps": 2}).json()
    assert set(small["placements"]) == {"small", "large"}
    large = http.post("/v1/benchmark", json={"width": LARGE, "height": LARGE, "num_inference_steps": 1}).json()
    assert set(large["placements"]) == {"large"}


def test_a_replica_measures_itself_once_at_a_time_whoever_asks(mixed: Mixed) -> None:
    handle = serve.get_deployment_handle("Diffusion-small", "tandem")
    outcomes = []
    for asked in [handle.benchmark.remote(SMALL, SMALL, 50) for _ in range(2)]:
        try:
            outcomes.append(asked.result(timeout_s=60))
        except RayTaskError as error:
            outcomes.append(error.cause)
    assert {type(each) for each in outcomes} == {Busy, dict}, outcomes


def test_each_placement_is_a_pool_of_its_own(mixed: Mixed) -> None:
    assert set(mixed.in_hand()) == {"diffusion:small", "diffusion:large"}
