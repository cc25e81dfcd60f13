"""The server as KubeRay deploys it: by a Serve configuration, with the secrets in the nodes' environment alone."""

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from moto.server import ThreadedMotoServer
from ray import serve
from ray._private.worker import global_worker
from ray.serve._private.api import serve_start
from ray.serve.schema import ApplicationStatus, ServeDeploySchema
from support.orders import finished, picture, submit
from support.server import free_port, ready, wait_until
from support.small_s3 import BUCKET, a_bucket

from serve.embedded import EmbeddedRedis
from serve.shapes.judge import read

pytestmark = [pytest.mark.cluster, pytest.mark.slow]  # test_executed_chart.py has the story

FIRST_KEY = f"tdm_{'b' * 12}_{secrets.token_urlsafe(32)}"
KEY = {"Authorization": f"Bearer {FIRST_KEY}"}
START_S = 120.0


@dataclass(frozen=True)
class Cluster:
    """One node, whose environment has `secrets`."""

    port: int
    secrets: dict[str, str]
    jobs: EmbeddedRedis

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def deploy(self, **args: Any) -> None:
        """As the head's REST API does with `serveConfigV2`."""
        manifest = f"""
            proxy_location: EveryNode
            http_options: {{host: 127.0.0.1, port: {self.port}, keep_alive_timeout_s: 90, request_timeout_s: 1200}}
            applications:
              - {{name: tandem, import_path: "deployments.app:build", route_prefix: /, args: {{}}}}
        """
        tree = yaml.safe_load(manifest)
        tree["applications"][0]["args"] = args
        config = ServeDeploySchema.model_validate(tree)
        client = serve_start(http_options=config.http_options.model_dump(), proxy_location=config.proxy_location)
        client.deploy_apps(config)

    def status(self) -> tuple[ApplicationStatus, str]:
        application = serve.status().applications["tandem"]
        return application.status, application.message

    def kept(self) -> bytes:
        """All that Ray keeps in its own store, which outlives the head in a Redis."""
        gcs = global_worker.gcs_client
        spaces = (b"serve", b"fun", b"job", b"", None)
        return b"".join(
            key + (gcs.internal_kv_get(key, space) or b"")
            for space in spaces
            for key in gcs.internal_kv_keys(b"", space)
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("config")
    with ExitStack() as stack:
        jobs = stack.enter_context(EmbeddedRedis(home, "jobs"))
        cache = stack.enter_context(EmbeddedRedis(home, "cache", 64 * 1024 * 1024))
        given = {
            "TANDEM_JOBS__REDIS_URL": jobs.url,
            "TANDEM_CACHE__REDIS_URL": cache.url,
            "TANDEM_KEYS__FIRST": FIRST_KEY,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(24),
        }
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in given.items():
            environment.setenv(name, value)
        # A settings file in the environment is for the operator's commands; Serve has `args`.
        environment.setenv("TANDEM_CONFIG", str(home / "not read"))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-"))
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
        )
        stack.callback(ray.shutdown)
        stack.callback(serve.shutdown)
        yield Cluster(free_port(), given, jobs)


@pytest.fixture
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    with a_bucket(url):
        yield url
    server.stop()


def test_a_wrong_setting_is_one_line_of_the_status(cluster: Cluster, tmp_path: Path) -> None:
    cluster.deploy(data_dir=str(tmp_path), http={"prot": 1})
    wait_until(lambda: cluster.status()[0] == ApplicationStatus.DEPLOY_FAILED, START_S, "Serve to give up")
    _, _, told = cluster.status()[1].partition("\n")
    assert told == "http.prot: no such setting (from args of the Serve application)"


def test_secrets_in_the_environment_are_enough_for_a_picture_in_whatever_order_the_parts_start(
    cluster: Cluster, tmp_path: Path, s3_endpoint: str
) -> None:
    cluster.jobs.kill()
    cluster.deploy(
        data_dir=str(tmp_path),
        diffusion={"profile_s": 0, "torch_threads": 1},
        results={"store": "s3", "s3": {"bucket": BUCKET, "endpoint_url": s3_endpoint, "region": "us-east-1"}},
    )
    wait_until(lambda: cluster.status()[0] == ApplicationStatus.RUNNING, START_S, "Serve to start what there is")
    with httpx.Client(base_url=cluster.url, timeout=60) as nobody:
        assert nobody.get("/healthz").status_code == 200
        assert not ready(cluster.url)
        answer = nobody.post("/v1/jobs", json={"prompt": "a red circle"}, headers=KEY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "backend_unavailable")
        cluster.jobs.start()
        wait_until(lambda: ready(cluster.url), 30, "the server to find its job Redis")
        wait_until(lambda: nobody.get("/v1/cache", headers=KEY).status_code == 200, 30, "the first key, of every scope")
        answer = nobody.post("/v1/jobs", json={"prompt": "a red circle"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
    with httpx.Client(base_url=cluster.url, timeout=60, headers=KEY) as http:
        job = finished(http, submit(http, "a red circle on a blue background", seed=1))
        assert http.get(job["images"][0]["url"]).headers["location"].startswith(f"{s3_endpoint}/{BUCKET}/images/")
        reading = read(picture(http, job))
        assert (reading.background, reading.things[0].color, reading.things[0].shape) == ("blue", "red", "circle")

    kept = cluster.kept()
    assert b"TANDEM_JOBS__REDIS_URL" in kept, "where the application is kept"
    assert [name for name, value in cluster.secrets.items() if len(value) > 3 and value.encode() in kept] == []
