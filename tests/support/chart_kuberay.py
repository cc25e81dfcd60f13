"""What KubeRay's operator checks in its own loop: the API server takes a RayService that breaks these rules, and then
it stands there with the condition ValidationFailed. Ported from the operator's validation (1.7), as far as the chart
can break it; and what the operator's hash of a cluster is made of, by which it decides to build a second one."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from support.chart import Manifest

NAME_LENGTH = 47
"""Of a RayService: KubeRay adds 6 characters for the cluster's name, and more for its pods' and services'."""
LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
PREFIX = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
START_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
MANAGED = "KUBERAY_GEN_AUTOSCALER_START_CMD"


def operator_rules(service: Manifest) -> list[str]:
    """What the operator would say; nothing where it would start the cluster."""
    spec, cluster = service["spec"], service["spec"]["rayClusterConfig"]
    return [
        *_metadata(service["metadata"]),
        *_upgrade(spec, cluster),
        *_groups(cluster),
        *_fault_tolerance(cluster, service["metadata"].get("annotations", {})),
        *_autoscaler(cluster),
        *_token(cluster),
    ]


def _metadata(meta: Mapping[str, Any]) -> Iterator[str]:
    if len(meta["name"]) > NAME_LENGTH:
        yield f"RayService name should be no more than {NAME_LENGTH} characters"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", meta["name"]):
        yield "RayService name should be a valid DNS1035 label"
    timeout = meta.get("annotations", {}).get("ray.io/initializing-timeout", "")
    if timeout and not re.fullmatch(r"(?=.*[1-9])(\d+|(\d+(\.\d+)?(ms|s|m|h))+)", timeout):
        yield f"annotation ray.io/initializing-timeout has invalid format: {timeout}"


def _upgrade(spec: Mapping[str, Any], cluster: Mapping[str, Any]) -> Iterator[str]:
    if cluster["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headGroupSpec.headService.metadata.name should not be set"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds should be a non-negative integer"
    if "upgradeStrategy" in cluster:
        yield "upgradeStrategy cannot be set when RayCluster is created by RayService"
    kind = spec.get("upgradeStrategy", {}).get("type", "NewCluster")
    if kind not in UPGRADES:
        yield f"upgradeStrategy.type value {kind} is invalid"
    if kind != "NewClusterWithIncrementalUpgrade":
        return
    options = spec["upgradeStrategy"].get("clusterUpgradeOptions")
    if not cluster.get("enableInTreeAutoscaling"):
        yield "Ray Autoscaler is required for NewClusterWithIncrementalUpgrade"
    if options is None:
        yield "ClusterUpgradeOptions are required for NewClusterWithIncrementalUpgrade"
        return
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent", -1)
    if not 0 <= surge <= 100:
        yield "maxSurgePercent must be between 0 and 100"
    if not 0 <= step <= 100:
        yield "stepSizePercent must be between 0 and 100"
    if step > surge:
        yield "stepSizePercent must be less than or equal to maxSurgePercent"
    if options.get("intervalSeconds", 0) <= 0:
        yield "intervalSeconds must be greater than 0"
    if not options.get("gatewayClassName"):
        yield "gatewayClassName is required for NewClusterWithIncrementalUpgrade"


def _groups(cluster: Mapping[str, Any]) -> Iterator[str]:
    workers = cluster.get("workerGroupSpecs", ())
    names = [group["groupName"] for group in workers]
    if len({*names}) < len(names):
        yield f"two worker groups of one name: {sorted(names)}"
    for group in (cluster["headGroupSpec"], *workers):
        name, params = group.get("groupName", "Head"), group.get("rayStartParams", {})
        if not group["template"]["spec"].get("containers"):
            yield f"group {name} should have at least one container"
        if any(params.get(each) for each in START_RESOURCES) and group.get("resources"):
            yield f"resource fields should not be set in both rayStartParams and Resources for {name} group"
        if "labels" in params:
            yield f"rayStartParams['labels'] is not supported for {name} group"
        for key, value in group.get("labels", {}).items():
            prefix, slash, own = key.rpartition("/")
            if not LABEL_NAME.fullmatch(own) or (slash and (len(prefix) > 253 or not PREFIX.fullmatch(prefix))):
                yield f"invalid label key for {name} group: {key!r}"
            if value and not LABEL_NAME.fullmatch(value):
                yield f"invalid label value for key {key!r} in {name} group: {value!r}"
        if any(not isinstance(value, str) for value in params.values()):
            yield f"rayStartParams of {name} group have a value that is not a string"
    for group in workers:
        name, least, most = group["groupName"], group.get("minReplicas"), group.get("maxReplicas")
        if not cluster.get("enableInTreeAutoscaling") and None in (least, most):
            yield f"worker group {name} must set both minReplicas and maxReplicas when autoscaling is disabled"
        if (least or 0) < 0 or (most or 0) < 0:
            yield f"worker group {name} has negative replicas"
        if least is not None and most is not None and least > most:
            yield f"worker group {name} has minReplicas {least} greater than maxReplicas {most}"
        if group.get("suspend"):
            yield f"worker group {name} cannot be suspended with Autoscaler enabled"
        if group.get("idleTimeoutSeconds", 0) < 0:
            yield f"worker group {name}: idleTimeoutSeconds must be non-negative"
        if "idleTimeoutSeconds" in group and not _is_v2(cluster):
            yield f"worker group {name}: idleTimeoutSeconds is set, but autoscaler v2 is not enabled"
        if group.get("priority") and not _is_v2(cluster):
            yield f"worker group {name}: priority is only supported with autoscaler v2 enabled"
        if group.get("priority") and _version(cluster) < (2, 56, 0):
            yield f"worker group {name}: priority is set, but minimum Ray version is 2.56.0"


def _fault_tolerance(cluster: Mapping[str, Any], annotations: Mapping[str, str]) -> Iterator[str]:
    head = cluster["headGroupSpec"]
    params, variables = head.get("rayStartParams", {}), _variables(head)
    options = cluster.get("gcsFaultToleranceOptions")
    if params.get("redis-username") or "REDIS_USERNAME" in variables:
        yield "cannot set redis username in rayStartParams or environment variables"
    if options is None:
        if annotations.get("ray.io/ft-enabled", "").lower() != "true" and "RAY_REDIS_ADDRESS" in variables:
            yield "RAY_REDIS_ADDRESS is set which implicitly enables GCS fault tolerance"
        return
    if annotations.get("ray.io/ft-enabled"):
        yield "ray.io/ft-enabled annotation and GcsFaultToleranceOptions are both set"
    if params.get("redis-password"):
        yield "cannot set `redis-password` in rayStartParams when GcsFaultToleranceOptions is enabled"
    for name in ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS"):
        if name in variables:
            yield f"cannot set `{name}` env var in head Pod when GcsFaultToleranceOptions is enabled"
    if annotations.get("ray.io/external-storage-namespace"):
        yield "cannot set `ray.io/external-storage-namespace` annotation when GcsFaultToleranceOptions is enabled"
    if options.get("storage") is not None and options.get("backend", "redis") == "redis":
        yield "cannot set GcsFaultToleranceOptions.Storage when backend is 'redis'"
    if options.get("backend", "redis") == "redis" and not options.get("redisAddress"):
        yield "gcsFaultToleranceOptions.redisAddress is empty"


def _autoscaler(cluster: Mapping[str, Any]) -> Iterator[str]:
    options = cluster.get("autoscalerOptions", {})
    switch = _variables(cluster["headGroupSpec"]).get("RAY_enable_autoscaler_v2", {}).get("value")
    if not cluster.get("enableInTreeAutoscaling"):
        if switch in ("1", "true"):
            yield "RAY_enable_autoscaler_v2 cannot be set when enableInTreeAutoscaling is false"
        return
    if "version" in options and switch is not None:
        yield "both autoscalerOptions.version and head Pod env var RAY_enable_autoscaler_v2 are set"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds must be non-negative"
    if any(each["name"] == MANAGED for each in options.get("env", ())):
        yield f"autoscalerOptions.env must not contain {MANAGED}"
    if _is_v2(cluster):
        for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", ())):
            if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
                name = group.get("groupName", "head")
                yield f"restartPolicy for {name} should be Never or unset when using autoscaler V2"


def _token(cluster: Mapping[str, Any]) -> Iterator[str]:
    auth = cluster.get("authOptions", {})
    if auth.get("enableK8sTokenAuth"):
        yield "K8s token auth mode is currently not supported for RayService"
    if auth.get("mode") == "token" and _version(cluster) < (2, 52, 0):
        yield f"authOptions.mode is 'token' but minimum Ray version is 2.52.0, got {cluster.get('rayVersion')!r}"


def _is_v2(cluster: Mapping[str, Any]) -> bool:
    return cluster.get("autoscalerOptions", {}).get("version") == "v2"


def _version(cluster: Mapping[str, Any]) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", str(cluster.get("rayVersion", "")))
    return tuple(map(int, found.groups())) if found else (0,)


def _variables(group: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {each["name"]: each for each in group["template"]["spec"]["containers"][0].get("env", ())}


def hashed(cluster: Mapping[str, Any]) -> str:
    """Changes when and only when the operator's own hash does: then it builds a second cluster beside the first."""
    told = copy.deepcopy(dict(cluster))
    told.pop("suspend", None)
    told.pop("upgradeStrategy", None)
    for group in (told["headGroupSpec"], *told.get("workerGroupSpecs", ())):
        for name in ("tolerations", "schedulingGates"):
            group["template"]["spec"].pop(name, None)
    for group in told.get("workerGroupSpecs", ()):
        for name in ("replicas", "minReplicas", "maxReplicas", "scaleStrategy"):
            group.pop(name, None)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def as_stored(service: Manifest) -> dict[str, Any]:
    """The RayCluster that KubeRay makes, with what the API server fills in: what Ray's autoscaler reads."""
    spec = copy.deepcopy(dict(service["spec"]["rayClusterConfig"]))
    for group in spec.get("workerGroupSpecs", ()):
        for name, value in (("replicas", 0), ("minReplicas", 0), ("maxReplicas", 2**31 - 1), ("numOfHosts", 1)):
            group.setdefault(name, value)
    name = f"{service['metadata']['name']}-x2x4x"
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": name, "namespace": "images"},
        "spec": spec,
    }
