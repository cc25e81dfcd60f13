"""The manifests under k8s/: in step with the chart, whole, and valid where kubectl can put them together."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
from support.chart import Manifest, Pods, documents, leaves, pods_of, where

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = [folder.parent for folder in sorted((K8S / "overlays").glob("*/kustomization.yaml"))]
VERSIONS = ("1.33", "1.35", "1.37")
CLUSTER_WIDE = {"Namespace", "GatewayClass"}
OTHERS = {"RayService", "HTTPRoute", "PodMonitor", "PrometheusRule", "Gateway", "GatewayClass"}
"""Kinds that Kubernetes itself doesn't have; the chart's own tests look into them."""
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
KUBECTL = shutil.which("kubectl")

needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not on the PATH")
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda folder: folder.name)


@functools.cache
def script() -> ModuleType:
    """scripts/ is no package."""
    spec = importlib.util.spec_from_file_location("render_k8s", ROOT / "scripts" / "render_k8s.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def built(folder: Path) -> tuple[Manifest, ...]:
    """What `kubectl apply -k` would send."""
    assert KUBECTL is not None
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return tuple(documents(done.stdout, str(folder)))


def of_kind(manifests: Iterable[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def secret_keys(node: Any) -> set[tuple[str, str]]:
    """(Secret, key) of everything that is read from one by its key."""
    found: dict[tuple[str | int, ...], dict[str, str]] = {}
    for path, value in leaves(node):
        if path[-2:-1] == ("secretKeyRef",):
            found.setdefault(path[:-1], {})[str(path[-1])] = value
    return {(ref["name"], ref["key"]) for ref in found.values()}


def given_secrets(text: str) -> set[tuple[str, str]]:
    """(Secret, key) of the `kubectl create secret` commands of a page."""
    commands = re.findall(r"create secret generic (\S+)((?:[^\n]*\\\n)*[^\n]*)", text)
    return {(name, key) for name, rest in commands for key in re.findall(r"--from-literal=([\w.-]+)=", rest)}


def violations(pods: Pods) -> Iterator[str]:
    """What the Pod Security Standard `restricted`, which the namespaces enforce, would refuse."""
    spec = pods.spec
    yield from (name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name))
    for volume in spec.get("volumes", ()):
        if not (volume.keys() - {"name"}) <= VOLUMES:
            yield f"volume {volume['name']}"
    pod = spec.get("securityContext", {})
    for container in pods.containers:
        own = container.get("securityContext", {})
        both: Mapping[str, Any] = {**pod, **own}
        name = container["name"]
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            yield f"{name}: privileges"
        if "ALL" not in own.get("capabilities", {}).get("drop", ()) or own.get("capabilities", {}).get("add"):
            yield f"{name}: capabilities"
        if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
            yield f"{name}: may be root"
        if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            yield f"{name}: seccomp"
        if any("hostPort" in port for port in container.get("ports", ())):
            yield f"{name}: host port"


def test_the_manifests_are_what_the_chart_renders() -> None:
    assert script().overlays() == OVERLAYS
    assert script().stale() == []


def test_a_changed_value_is_noticed(tmp_path: Path) -> None:
    for overlay in OVERLAYS:
        shutil.copytree(overlay, tmp_path / overlay.name)
    values = tmp_path / OVERLAYS[0].name / "values.yaml"
    text = values.read_text(encoding="utf-8")
    assert text.count("max: 1\n") == 1
    values.write_text(text.replace("max: 1\n", "max: 2\n"), encoding="utf-8")
    assert script().stale(tmp_path) == [OVERLAYS[0].name]


def test_a_secret_is_not_written_into_a_manifest(tmp_path: Path) -> None:
    text = (OVERLAYS[0] / "values.yaml").read_text(encoding="utf-8")
    assert text.count("keys: {existingSecret: tandem-first-key}\n") == 1
    (tmp_path / "values.yaml").write_text(
        text.replace("keys: {existingSecret: tandem-first-key}\n", ""), encoding="utf-8"
    )
    with pytest.raises(SystemExit, match="Secret tandem-first-key, which would lie in git"):
        script().manifest(tmp_path)


@needs_kubectl
@each_overlay
def test_an_overlay_is_whole(overlay: Path) -> None:
    manifests = built(overlay)
    assert len(of_kind(manifests, "RayService")) == 1
    names = Counter((each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in manifests)
    assert [name for name, count in names.items() if count > 1] == []
    for manifest in manifests:
        assert manifest["metadata"].get("namespace") == (None if manifest["kind"] in CLUSTER_WIDE else "tandem")
        assert "helm.sh/hook" not in manifest["metadata"].get("annotations", {}), where(manifest)


@needs_kubectl
@each_overlay
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(overlay: Path, version: str) -> None:
    checked = 0
    for manifest in built(overlay):
        if manifest["kind"] not in OTHERS:
            kubernetes_validate.validate(manifest, version, strict=True)
            checked += 1
    assert checked > len(OTHERS)


@needs_kubectl
@each_overlay
def test_the_namespace_lets_every_pod_in(overlay: Path) -> None:
    (namespace,) = of_kind(built(overlay), "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pods = pods_of(built(overlay))
    assert pods
    assert {each.where: found for each in pods if (found := list(violations(each)))} == {}


@needs_kubectl
@each_overlay
def test_every_secret_is_given_before(overlay: Path) -> None:
    """By a command of the README, or by the overlay itself where everybody may know it."""
    manifests = built(overlay)
    made = {(each["metadata"]["name"], key) for each in of_kind(manifests, "Secret") for key in each["data"]}
    assert bool(made) == (overlay.name == "dev-kind")
    given = made or given_secrets((K8S / "README.md").read_text(encoding="utf-8"))
    wanted = secret_keys([each for each in manifests if each["kind"] != "Secret"])
    assert wanted
    assert wanted - given == set()


@needs_kubectl
def test_the_gateway_takes_the_route_that_production_hangs_on_it() -> None:
    (route,) = of_kind(built(K8S / "overlays" / "production"), "HTTPRoute")
    (gateway,) = of_kind(documents((K8S / "prerequisites" / "gateway.yaml").read_text(encoding="utf-8")), "Gateway")
    (parent,) = route["spec"]["parentRefs"]
    (listener,) = gateway["spec"]["listeners"]
    assert parent["name"] == gateway["metadata"]["name"]
    assert parent["namespace"] == gateway["metadata"]["namespace"]
    assert parent["sectionName"] == listener["name"]
    assert route["spec"]["hostnames"] == [listener["hostname"]]
    selected = listener["allowedRoutes"]["namespaces"]["selector"]["matchLabels"]
    assert selected == {"kubernetes.io/metadata.name": route["metadata"]["namespace"]}
