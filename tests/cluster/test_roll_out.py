"""A change of settings under synchronous calls, deployed as KubeRay does: no call is cut, and the application counts as
running only while every pool is."""

import secrets
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve
from ray.serve._private.api import serve_start
from ray.serve.schema import ApplicationStatus, DeploymentStatus, ServeDeploySchema
from support.server import free_port, ready, wait_until

from serve.embedded import EmbeddedRedis

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

FIRST_KEY = f"tdm_{'b' * 12}_{secrets.token_urlsafe(32)}"
START_S, LONG_S = 240.0, 800.0
WANTED = {"Ingress": 2, "Diffusion-shapes": 2}
ORDER = {"prompt": "a red circle", "width": 512, "height": 512, "num_inference_steps": 60}
CALLS = 4


@dataclass
class Server:
    port: int
    folder: Path
    replicas: set[str] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def deploy(self, max_queued: int) -> None:
        args = {
            "data_dir": str(self.folder),
            "http": {"replicas": WANTED["Ingress"], "wait_s": LONG_S, "drain_s": LONG_S},
            "diffusion": {"replicas": WANTED["Diffusion-shapes"], "profile_s": 0, "drain_s": LONG_S},
            "jobs": {"max_queued": max_queued, "timeout_s": LONG_S},
        }
        http = {"host": "127.0.0.1", "port": self.port, "request_timeout_s": 1200}
        application = {"name": "tandem", "import_path": "deployments.app:build", "route_prefix": "/", "args": args}
        tree = {"proxy_location": "EveryNode", "http_options": http, "applications": [application]}
        config = ServeDeploySchema.model_validate(yaml.safe_load(yaml.safe_dump(tree)))
        client = serve_start(http_options=config.http_options.model_dump(), proxy_location=config.proxy_location)
        client.deploy_apps(config)

    def running(self) -> bool:
        """Whether Serve says so: KubeRay moves traffic by this. Then every pool must have all that it wants."""
        told = serve.status().applications["tandem"]
        if told.status != ApplicationStatus.RUNNING:
            return False
        for name, its in told.deployments.items():
            assert its.status == DeploymentStatus.HEALTHY, (name, its)
            assert its.replica_states.get("RUNNING", 0) >= WANTED.get(name, 1), (name, its)
        return True

    def call(self) -> dict[str, Any]:
        with httpx.Client(headers={"Authorization": f"Bearer {FIRST_KEY}"}, timeout=LONG_S) as client:
            answer = client.post(f"{self.url}/v1/jobs?wait=true", json=ORDER)
            assert answer.status_code == 200, answer.text
            told: dict[str, Any] = answer.json()
            return told


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with ExitStack() as stack:
        jobs = stack.enter_context(EmbeddedRedis(tmp_path, "jobs"))
        cache = stack.enter_context(EmbeddedRedis(tmp_path, "cache", 1 << 26))
        monkeypatch.setenv("TANDEM_JOBS__REDIS_URL", jobs.url)
        monkeypatch.setenv("TANDEM_CACHE__REDIS_URL", cache.url)
        monkeypatch.setenv("TANDEM_KEYS__FIRST", FIRST_KEY)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-"))
        ray.init(address="local", num_cpus=8, include_dashboard=False, _temp_dir=folder, _node_ip_address="127.0.0.1")
        stack.callback(ray.shutdown)
        stack.callback(serve.shutdown)
        yield Server(free_port(), tmp_path / "data")


def ingresses() -> set[str]:
    """The actors of ingress replicas that live."""
    names = ray.util.list_named_actors(all_namespaces=True)
    return {each["name"] for each in names if each["name"] and "#Ingress#" in each["name"]}


def test_a_roll_out_cuts_no_call_and_ends_only_with_every_pool(server: Server) -> None:
    server.deploy(max_queued=100)
    wait_until(server.running, START_S, "the application")
    wait_until(lambda: ready(server.url), 30, "every pool")
    before = ingresses()
    assert len(before) == WANTED["Ingress"]
    with ThreadPoolExecutor(CALLS) as pool, httpx.Client(timeout=60) as asking:
        calls = [pool.submit(server.call) for _ in range(CALLS)]
        wait_until(lambda: depth(server) >= CALLS, 30, "the orders")
        server.deploy(max_queued=101)
        wait_until(lambda: ingresses() - before, START_S, "a new ingress")
        assert not all(each.done() for each in calls), "they were too short to say anything"
        wait_until(lambda: asking.get(f"{server.url}/healthz").status_code == 200 and server.running(), START_S, "it")
        done = [each.result(LONG_S) for each in calls]
    assert {each["state"] for each in done} == {"succeeded"}
    assert {each["attempt"] for each in done} == {1}, "what was in hand was finished, not begun again"
    wait_until(lambda: not ingresses() & before, 60, "the old ones to be gone")


def depth(server: Server) -> int:
    """Jobs that have not ended."""
    with httpx.Client(headers={"Authorization": f"Bearer {FIRST_KEY}"}) as client:
        told = client.get(f"{server.url}/v1/jobs?limit=50").json()
    return sum(each["state"] not in ("succeeded", "failed") for each in told["data"])
