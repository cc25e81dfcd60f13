"""Each check finds what it is there for: a sound release with one thing changed, and what is then said."""

import base64
import copy
import dataclasses
from typing import Any

import pytest
from support.chart import CI, Manifest, Place, Rendered, render, where
from support.chart_kuberay import operator_rules
from support.chart_links import LINKS
from support.chart_rules import RULES

ALL = {**RULES, **LINKS}
CLUSTER: Place = ("spec", "rayClusterConfig")
HEAD: Place = (*CLUSTER, "headGroupSpec")
HEAD_POD: Place = (*HEAD, "template", "spec")
WORKER: Place = (*CLUSTER, "workerGroupSpecs", 0)
WORKER_POD: Place = (*WORKER, "template", "spec")
BOX: Place = ("containers", 0)
POD: Place = ("spec", "template", "spec")
SERVICE, CACHE, JOBS = "RayService/tandem", "Deployment/tandem-redis-cache", "StatefulSet/tandem-redis-jobs"
REMOVED = object()


@pytest.fixture(scope="module")
def sound() -> Rendered:
    found = render(next(file for file in CI if file.name.startswith("monitoring")))
    for name, rule in ALL.items():
        assert rule(found) == [], name
    return found


def changed(release: Rendered, name: str, path: Place, value: Any) -> Rendered:
    manifests = copy.deepcopy(list(release.manifests))
    (one,) = [each for each in manifests if where(each) == name]
    _change(one, path, value)
    return dataclasses.replace(release, manifests=tuple(manifests))


def _change(manifest: Manifest, path: Place, value: Any) -> None:
    node = manifest
    for step in path[:-1]:
        node = node[step] if isinstance(node, list) else node.setdefault(step, {})
    if value is REMOVED:
        del node[path[-1]]
    elif path[-1] == "+":
        node.append(value)
    else:
        node[path[-1]] = value


FAULTS: list[tuple[str, str, Place, Any, str]] = [
    ("resources", SERVICE, (*WORKER_POD, *BOX, "resources", "requests", "cpu"), REMOVED, "no cpu request"),
    ("resources", CACHE, (*POD, *BOX, "resources", "limits"), {}, "no memory limit"),
    ("resources", SERVICE, (*CLUSTER, "autoscalerOptions", "resources"), REMOVED, "container autoscaler: no cpu"),
    ("resources", SERVICE, (*WORKER_POD, *BOX, "resources", "requests", "memory"), "900Gi", "more memory than"),
    ("security", SERVICE, (*HEAD_POD, *BOX, "securityContext", "readOnlyRootFilesystem"), False, "root file system"),
    ("security", SERVICE, (*HEAD_POD, "securityContext", "runAsNonRoot"), REMOVED, "runs as root"),
    ("security", CACHE, (*POD, *BOX, "securityContext", "capabilities"), {}, "keeps capabilities"),
    ("security", JOBS, (*POD, "securityContext", "seccompProfile"), REMOVED, "seccomp"),
    ("security", SERVICE, (*WORKER_POD, "hostNetwork"), True, "hostNetwork"),
    ("security", SERVICE, (*CLUSTER, "autoscalerOptions", "volumeMounts"), [], "autoscaler: nothing to write"),
    ("tokens", SERVICE, (*HEAD_POD, "automountServiceAccountToken"), False, "no token for the Kubernetes API"),
    ("tokens", SERVICE, (*WORKER_POD, "automountServiceAccountToken"), True, "has no use for"),
    ("images", SERVICE, (*HEAD_POD, *BOX, "image"), "ghcr.io/acme/tandem:latest", "has no version"),
    ("images", CACHE, (*POD, *BOX, "image"), "docker.io/other/redis:1", "none that the values"),
    ("names", CACHE, ("metadata", "labels", "app.kubernetes.io/instance"), REMOVED, "no label"),
    ("names", JOBS, ("metadata", "name"), "x" * 53, "at most 52 characters"),
    ("labels", SERVICE, (*WORKER, "template", "metadata", "labels", "helm.sh/chart"), "1", "label helm.sh/chart"),
    ("labels", SERVICE, (*HEAD, "template", "metadata", "annotations"), {"checksum/config": "1"}, "checksum/config"),
    ("patience", SERVICE, (*WORKER_POD, "terminationGracePeriodSeconds"), 30, "30 s of grace"),
    ("patience", SERVICE, (*WORKER_POD, "terminationGracePeriodSeconds"), 210, "prepared for 210 s, and it has 210 s"),
    ("patience", SERVICE, (*HEAD_POD, "terminationGracePeriodSeconds"), 180, "head: its end is prepared for 180 s"),
    ("patience", SERVICE, (*HEAD_POD, *BOX, "lifecycle"), REMOVED, "head: nothing is done before its end"),
    ("patience", SERVICE, (*WORKER_POD, *BOX, "lifecycle", "preStop", "exec", "command"), ["sleep", "9"], "9 s, and a"),
    ("patience", SERVICE, ("spec", "rayClusterDeletionDelaySeconds"), 5, "the old cluster stays 5 s"),
    ("services", "Service/tandem-redis-jobs", ("spec", "selector"), {"app.kubernetes.io/name": "tandem"}, "leads to"),
    ("services", "Service/tandem-redis-jobs", ("spec", "ports", 0, "targetPort"), 6380, "has no port 6380"),
    ("serve_service", SERVICE, ("spec", "serveService", "spec", "ports", 0, "name"), "http", "has no port http"),
    ("serve_service", SERVICE, ("spec", "serveService", "spec", "ports", 0, "targetPort"), 8001, "has no port 8001"),
    ("selectors", CACHE, ("spec", "selector", "matchLabels", "app.kubernetes.io/component"), "x", "is not its pods'"),
    ("selectors", JOBS, ("spec", "serviceName"), "elsewhere", "there is no Service elsewhere"),
    ("selectors", "PodMonitor/tandem", ("spec", "podMetricsEndpoints", 0, "port"), "other", "has no port other"),
    ("selectors", "PodMonitor/tandem", ("spec", "selector", "matchLabels", "x"), "y", "selects no pods"),
    ("references", "Secret/tandem-redis", ("data",), {"other": "eA=="}, "Secret tandem-redis has no password"),
    ("references", "ConfigMap/tandem-config", ("metadata", "name"), "other", "there is no ConfigMap tandem-config"),
    ("mounts", SERVICE, (*WORKER_POD, "volumes"), [], "there is no volume"),
    ("mounts", SERVICE, (*HEAD_POD, *BOX, "volumeMounts", "+"), {"name": "tmp", "mountPath": "/data"}, "two volumes"),
    ("variables", SERVICE, (*WORKER_POD, *BOX, "env", "+"), {"name": "TANDEM_PORT", "value": "1"}, "is no setting"),
    ("variables", SERVICE, (*WORKER_POD, *BOX, "env", "+"), {"name": "HOME", "value": "/"}, "HOME twice"),
    ("variables", SERVICE, (*WORKER_POD, "enableServiceLinks"), REMOVED, "service links"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "name", "path", "value", "told"), FAULTS, ids=lambda each: "")
def test_house_rule_finds(sound: Rendered, rule: str, name: str, path: Place, value: Any, told: str) -> None:
    complaints = ALL[rule](changed(sound, name, path, value))
    assert any(told in each for each in complaints), complaints


def test_a_secret_elsewhere_is_found(sound: Rendered) -> None:
    (secret,) = [each for each in sound.of("Secret") if each["metadata"]["name"] == "tandem-redis"]
    password = base64.b64decode(secret["data"]["password"]).decode()
    bare = changed(sound, "ConfigMap/tandem-config", ("data", "tandem.yaml"), f"url: redis://:{password}@here")
    assert any("tells Secret/tandem-redis password" in each for each in RULES["secrecy"](bare))
    noted = dataclasses.replace(sound, notes=f"The password is {password}")
    assert RULES["secrecy"](noted) == ["NOTES tell Secret/tandem-redis password"]


def test_a_route_to_nowhere_is_found() -> None:
    release = render(next(file for file in CI if file.name.startswith("network-policy")))
    (route,) = release.of("HTTPRoute")
    path: Place = ("spec", "rules", 0, "backendRefs", 0, "port")
    assert LINKS["backends"](release) == []
    (told,) = LINKS["backends"](changed(release, where(route), path, 81))
    assert "nothing at tandem-serve-svc:81" in told


def test_every_house_rule_is_tried() -> None:
    elsewhere = {"budgets", "scaled", "secrecy", "backends"}
    assert {each[0] for each in FAULTS} | elsewhere == ALL.keys()


BREAKS: list[tuple[Place, Any, str]] = [
    (("metadata", "name"), "x" * 48, "no more than 47 characters"),
    (("metadata", "name"), "9lives", "DNS1035"),
    (("metadata", "annotations", "ray.io/initializing-timeout"), "soon", "invalid format"),
    (("metadata", "annotations", "ray.io/ft-enabled"), "true", "are both set"),
    (("spec", "upgradeStrategy", "type"), "Recreate", "is invalid"),
    (("spec", "upgradeStrategy", "type"), "NewClusterWithIncrementalUpgrade", "ClusterUpgradeOptions are required"),
    (("spec", "rayClusterDeletionDelaySeconds"), -1, "non-negative"),
    ((*CLUSTER, "upgradeStrategy"), {"type": "None"}, "cannot be set when RayCluster is created by RayService"),
    ((*HEAD, "resources"), {"CPU": "0"}, "both rayStartParams and Resources for Head"),
    ((*WORKER, "rayStartParams", "labels"), "a=b", "rayStartParams['labels']"),
    ((*WORKER, "labels"), {"tandem.dev/gpu-class": "four gb"}, "invalid label value"),
    ((*WORKER, "labels"), {"/gpu": "x"}, "invalid label key"),
    ((*WORKER, "rayStartParams", "num-cpus"), 4, "not a string"),
    ((*WORKER, "minReplicas"), 9, "greater than maxReplicas"),
    ((*WORKER, "minReplicas"), -1, "negative"),
    ((*WORKER, "suspend"), True, "cannot be suspended"),
    ((*CLUSTER, "workerGroupSpecs", 1, "groupName"), "cpu", "two worker groups of one name"),
    ((*CLUSTER, "autoscalerOptions", "version"), "v1", "autoscaler v2 is not enabled"),
    ((*HEAD_POD, *BOX, "env", "+"), {"name": "RAY_enable_autoscaler_v2", "value": "1"}, "are set"),
    ((*HEAD_POD, *BOX, "env", "+"), {"name": "REDIS_PASSWORD", "value": "x"}, "cannot set `REDIS_PASSWORD`"),
    ((*HEAD_POD, *BOX, "env", "+"), {"name": "REDIS_USERNAME", "value": "x"}, "cannot set redis username"),
    ((*HEAD, "rayStartParams", "redis-password"), "x", "cannot set `redis-password`"),
    ((*CLUSTER, "gcsFaultToleranceOptions", "storage"), {"size": "1Gi"}, "when backend is 'redis'"),
    ((*CLUSTER, "gcsFaultToleranceOptions", "redisAddress"), "", "redisAddress is empty"),
    ((*WORKER_POD, "restartPolicy"), "Always", "should be Never or unset"),
    ((*CLUSTER, "rayVersion"), "2.51.0", "minimum Ray version is 2.52.0"),
    ((*CLUSTER, "authOptions", "enableK8sTokenAuth"), True, "not supported for RayService"),
    ((*WORKER_POD, "containers"), [], "at least one container"),
    ((*HEAD, "headService"), {"metadata": {"name": "mine"}}, "should not be set"),
]


@pytest.mark.parametrize(("path", "value", "told"), BREAKS, ids=lambda each: "")
def test_the_operator_would_refuse(sound: Rendered, path: Place, value: Any, told: str) -> None:
    before = changed(sound, SERVICE, (*WORKER, "idleTimeoutSeconds"), 60)
    assert operator_rules(before.service) == []
    service = copy.deepcopy(dict(before.service))
    _change(service, path, value)
    assert any(told in each for each in operator_rules(service)), operator_rules(service)


def test_an_incremental_upgrade_has_its_bounds() -> None:
    release = render(next(file for file in CI if file.name.startswith("upgrade")))
    options: Place = ("spec", "upgradeStrategy", "clusterUpgradeOptions")
    breaks: list[tuple[str, Any, str]] = [
        ("maxSurgePercent", 101, "between 0 and 100"),
        ("stepSizePercent", 101, "between 0 and 100"),
        ("intervalSeconds", 0, "greater than 0"),
        ("gatewayClassName", "", "is required"),
    ]
    assert operator_rules(release.service) == []
    for name, value, told in breaks:
        broken = changed(release, SERVICE, (*options, name), value)
        assert any(told in each for each in operator_rules(broken.service)), name
