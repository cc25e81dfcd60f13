"""A release from its first install to its end, on a real API server: what it takes, what it keeps, what it leaves.

No controller runs there: what a StatefulSet claims, and all that KubeRay makes, is not seen."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import helm_python
import pytest
import yaml
from support.api_server import ASSETS, ApiServer, missing, running
from support.chart import CHART, CI, NAMESPACE, over, values_of
from support.chart_schemas import OWN, crd_folder, custom_definition

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or ASSETS)

NAME = "tandem"
NUMBERS = itertools.count(1)
KEPT = {"PersistentVolumeClaim/tandem-weights"}
"""What an uninstalled release leaves on purpose."""
EVERYTHING: dict[str, Any] = {
    "image": {"registry": "ghcr.io/acme"},
    "s3": {"bucket": "pictures", "accessKeyId": "AKIAEXAMPLE", "secretAccessKey": "an-example-of-a-secret"},
    "weights": {"enabled": True},
    "prePull": {"enabled": True},
    "ingress": {"enabled": True, "hosts": ["images.example.com"]},
    "gateway": {"enabled": True, "parentRefs": [{"name": "door"}]},
    "monitoring": {"podMonitor": {"enabled": True}, "rules": {"enabled": True}, "dashboards": {"enabled": True}},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running(tmp_path_factory.mktemp("api-server")) as found:
        for api_version, kind in OWN:
            definition = custom_definition(api_version, kind)
            folder = crd_folder()
            if kind == "RayService" and folder is not None:
                definition = yaml.safe_load((folder / "ray.io_rayservices.yaml").read_text(encoding="utf-8"))
            found.apply(definition)
            found.established(definition)
        yield found


@pytest.fixture
def namespace(server: ApiServer) -> str:
    name = f"{NAMESPACE}-{next(NUMBERS)}"
    server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    return name


@pytest.fixture
def helm(server: ApiServer, namespace: str) -> Iterator[helm_python.Config]:
    with contextlib.closing(helm_python.Config(kubeconfig_content=server.kubeconfig, namespace=namespace)) as config:
        yield config


@pytest.fixture(scope="module")
def chart() -> Iterator[helm_python.Chart]:
    with helm_python.Chart.load(CHART) as loaded:
        yield loaded


def test_the_server_takes_every_example(
    server: ApiServer, helm: helm_python.Config, chart: helm_python.Chart, namespace: str
) -> None:
    """With all that it knows beyond schemas: names, immutable fields, values that exclude each other."""
    before = server.objects(namespace).keys()
    for file in CI:
        release = helm.install(chart, NAME, values_of(file), namespace=namespace, dry_run="server")
        assert "kind: RayService" in release["manifest"], file.name
    assert server.objects(namespace).keys() == before


def test_a_release_from_install_to_uninstall(
    server: ApiServer, helm: helm_python.Config, chart: helm_python.Chart, namespace: str
) -> None:
    before = server.objects(namespace).keys()
    helm.install(chart, NAME, EVERYTHING, namespace=namespace, timeout=120)
    installed = server.objects(namespace)
    kinds = {name.partition("/")[0] for name in installed.keys() - before}
    assert {
        "RayService",
        "StatefulSet",
        "Secret",
        "NetworkPolicy",
        "PodMonitor",
        "PrometheusRule",
        "HTTPRoute",
    } <= kinds

    upgraded = over(EVERYTHING, {"config": {"jobs": {"max_queued": 7}}, "ingress": {"enabled": False}})
    helm.upgrade(chart, NAME, upgraded, namespace=namespace, timeout=120)
    after = server.objects(namespace)
    assert "max_queued: 7" in after["RayService/tandem"]["spec"]["serveConfigV2"]
    assert not any(name.startswith("Ingress/") for name in after)
    for name, each in installed.items():
        if name.startswith("Secret/tandem"):
            assert after[name]["data"] == each["data"], f"{name} has changed with an upgrade"
    cluster = "rayClusterConfig"
    assert after["RayService/tandem"]["spec"][cluster] == installed["RayService/tandem"]["spec"][cluster]

    helm.rollback(NAME, version=1, timeout=120)
    again = server.objects(namespace)
    assert again["RayService/tandem"]["spec"] == installed["RayService/tandem"]["spec"]
    assert any(name.startswith("Ingress/") for name in again)
    assert [each["revision"] for each in helm.history(NAME)] == [1, 2, 3]

    helm.uninstall(NAME, timeout=120)
    assert server.objects(namespace).keys() - before == KEPT
