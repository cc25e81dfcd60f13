"""What every manifest of the chart must be, whichever values it is rendered from. Each rule says what breaks it."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from support.chart import Manifest, Pods, Rendered, at, leaves, pods_of, where

Rule = Callable[[Rendered], list[str]]

UNITS = {"": 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{letter}i": 1024**power for power, letter in enumerate("KMGT", 1)}
LONGEST_NAME = {"StatefulSet": 52, "Job": 63, "CronJob": 52}
"""Of kinds whose pods carry the name and more in a label of 63 characters."""
SECRET_LENGTH = 8
"""Shorter values of a Secret are no secrets, and stand elsewhere by chance."""
OURS_ALONE = {"app.kubernetes.io/instance", "app.kubernetes.io/component"}
"""Labels of Ray's pod templates. A version or a checksum among them builds a second cluster with each upgrade, and
`app.kubernetes.io/name` takes the head away from the service that KubeRay makes for it."""


def quantity(text: Any) -> Decimal:
    """What Kubernetes understands by `200m`, `4Gi`, `1`. ValueError where it understands nothing."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", str(text))
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{text!r} is no quantity")
    return Decimal(found[1]) * UNITS[found[2]]


def containers(rendered: Rendered) -> Iterator[tuple[str, Pods, Mapping[str, Any]]]:
    for pods in pods_of(rendered.manifests):
        for container in pods.containers:
            yield f"{pods.where}, container {container['name']}", pods, container


def resources(rendered: Rendered) -> list[str]:
    """Without a request the scheduler puts pods anywhere; without a limit one container takes a node's memory."""
    faults = []
    for place, _, container in containers(rendered):
        given = container.get("resources", {})
        requests, limits = given.get("requests", {}), given.get("limits", {})
        faults += [f"{place}: no {name} request" for name in ("cpu", "memory") if name not in requests]
        faults += [] if "memory" in limits else [f"{place}: no memory limit"]
        for name in requests.keys() & limits.keys():
            if quantity(requests[name]) > quantity(limits[name]):
                faults.append(f"{place}: requests more {name} than its limit")
        for table, amounts in (("requests", requests), ("limits", limits)):
            for name, amount in amounts.items():
                if not quantity(amount):
                    faults.append(f"{place}: {table} of {name} is {amount}")
        gpus = [name for name in {*requests, *limits} if name.endswith("/gpu")]
        for name in gpus:
            if requests.get(name, limits.get(name)) != limits.get(name) or quantity(limits[name]) % 1:
                faults.append(f"{place}: {name} must be a whole number in `limits`")
    return faults


def security(rendered: Rendered) -> list[str]:
    """The restricted Pod Security Standard, and a root file system that nobody writes to."""
    faults = []
    for pods in pods_of(rendered.manifests):
        for name in ("hostNetwork", "hostPID", "hostIPC"):
            faults += [f"{pods.where}: {name}"] if pods.spec.get(name) else []
        faults += [
            f"{pods.where}: volume {each['name']} is a host path" for each in _volumes(pods) if "hostPath" in each
        ]
    for place, pods, container in containers(rendered):
        pod, own = pods.spec.get("securityContext", {}), container.get("securityContext", {})
        both = {**pod, **own}
        wrong = {
            "runs as root": both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0,
            "root file system is writable": own.get("readOnlyRootFilesystem") is not True,
            "may escalate privileges": own.get("allowPrivilegeEscalation") is not False,
            "keeps capabilities": "ALL" not in own.get("capabilities", {}).get("drop", ()),
            "adds capabilities": bool(own.get("capabilities", {}).get("add")),
            "is privileged": bool(own.get("privileged")),
            "has no seccomp profile": both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"),
        }
        faults += [f"{place}: {what}" for what, is_so in wrong.items() if is_so]
        paths = [each["mountPath"] for each in container.get("volumeMounts", ())]
        if pods.is_ray and not {"/tmp", "/tmp/"} & set(paths):
            faults.append(f"{place}: nothing to write to at /tmp, where Ray keeps its sockets and logs")
    return faults


def tokens(rendered: Rendered) -> list[str]:
    """Who talks to the Kubernetes API: the autoscaler beside Ray's head, and nobody else."""
    accounts = {each["metadata"]["name"]: each for each in rendered.of("ServiceAccount")}
    faults = []
    for pods in pods_of(rendered.manifests):
        account = accounts.get(pods.spec.get("serviceAccountName", ""), {})
        mounts = pods.spec.get("automountServiceAccountToken", account.get("automountServiceAccountToken", True))
        if pods.is_head and not mounts:
            faults.append(f"{pods.where}: the autoscaler in it has no token for the Kubernetes API")
        if "ray.io/is-ray-node" not in pods.labels and mounts:
            faults.append(f"{pods.where}: mounts a token for the Kubernetes API that it has no use for")
        if pods.labels.get("ray.io/node-type") == "worker" and mounts:
            faults.append(f"{pods.where}: mounts a token for the Kubernetes API that it has no use for")
    return faults


def images(rendered: Rendered) -> list[str]:
    """Every image has a version, and lies in the registry that the values name."""
    values = rendered.values
    ours = f"{values['image']['registry'].rstrip('/')}/{values['image']['repository']}:"
    others = {values["redis"]["image"], values["s3"]["trial"]["image"]}
    faults = []
    for place, _, container in containers(rendered):
        image = container["image"]
        name, _, tag = image.partition("@")[0].rpartition(":")
        if not name or "/" in tag or tag.removesuffix("-cpu").removesuffix("-cuda") in ("", "latest"):
            faults.append(f"{place}: image {image} has no version")
        if not image.startswith(ours) and image not in others:
            faults.append(f"{place}: image {image} is none that the values name")
    return faults


def budgets(rendered: Rendered) -> list[str]:
    """A percentage or `maxUnavailable` blocks every eviction of Ray pods: they have no scale subresource. A budget as
    large as what it selects blocks them for ever."""
    faults = []
    for budget in rendered.of("PodDisruptionBudget"):
        spec, place = budget["spec"], where(budget)
        least = spec.get("minAvailable")
        if "maxUnavailable" in spec:
            faults.append(f"{place}: maxUnavailable on pods without a scale subresource")
        if not isinstance(least, int) or isinstance(least, bool):
            faults.append(f"{place}: minAvailable {least!r} is not a whole number")
            continue
        if spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            faults.append(f"{place}: a pod that is not ready can't be evicted (unhealthyPodEvictionPolicy)")
        stay = sum(pods.least or 0 for pods in pods_of(rendered.manifests) if selects(spec["selector"], pods.labels))
        if least >= stay:
            faults.append(f"{place}: keeps {least} of the {stay} pods that stay, so that no node can be drained")
    return faults


def scaled(rendered: Rendered) -> list[str]:
    """Helm applies server-side: `replicas` in a manifest takes them back from whoever scales, or conflicts with it."""
    targets = {(each["kind"], each["metadata"]["name"]): each for each in rendered.manifests}
    faults = []
    for scaler in (*rendered.of("HorizontalPodAutoscaler"), *rendered.of("ScaledObject")):
        target = scaler["spec"]["scaleTargetRef"]
        scaled_one = targets.get((target.get("kind", "Deployment"), target["name"]))
        if scaled_one is not None and "replicas" in scaled_one["spec"]:
            faults.append(f"{where(scaled_one)}: has spec.replicas, which {where(scaler)} sets")
    return faults


def names(rendered: Rendered) -> list[str]:
    """Unique, short enough, of this release, in the release's namespace, with the labels that tools look for."""
    faults, seen = [], set()
    for manifest in rendered.manifests:
        place, meta = where(manifest), manifest["metadata"]
        key = manifest["apiVersion"].split("/")[0], manifest["kind"], meta.get("namespace"), meta["name"]
        faults += [f"{place}: rendered twice"] if key in seen else []
        seen.add(key)
        longest = LONGEST_NAME.get(manifest["kind"], 63)
        if len(meta["name"]) > longest or not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", meta["name"]):
            faults.append(f"{place}: the name has to be a DNS label of at most {longest} characters")
        labels = meta.get("labels", {})
        for name in ("name", "instance", "managed-by"):
            faults += [] if f"app.kubernetes.io/{name}" in labels else [f"{place}: no label app.kubernetes.io/{name}"]
    return faults


def labels(rendered: Rendered) -> list[str]:
    """Labels and annotations of Ray's pods don't change with the chart's version: KubeRay would build a new cluster."""
    faults = []
    version = str(rendered.service["metadata"]["labels"].get("helm.sh/chart", "")).removeprefix("tandem-")
    cluster = rendered.cluster
    groups = {"head": cluster["headGroupSpec"], **{each["groupName"]: each for each in cluster["workerGroupSpecs"]}}
    given = {"head": [rendered.values["ray"]["head"]]}
    for group in rendered.values["workerGroups"]:
        given[group["name"]] = [rendered.values["workerDefaults"], group]
    for name, group in groups.items():
        meta = group["template"].get("metadata", {})
        allowed = OURS_ALONE.union(*(each.get("labels", {}) for each in given[name]))
        notes = set().union(*(each.get("annotations", {}) for each in given[name]))
        faults += [f"Ray pods {name}: label {each}" for each in sorted(meta.get("labels", {}).keys() - allowed)]
        faults += [f"Ray pods {name}: annotation {each}" for each in sorted(meta.get("annotations", {}).keys() - notes)]
        faults += [] if meta.get("labels", {}).keys() >= OURS_ALONE else [f"Ray pods {name}: no instance or component"]
        told = [value for _, value in leaves(meta) if version and version in str(value)]
        faults += [f"Ray pods {name}: {value} has the chart's version" for value in told]
    return faults


def secrecy(rendered: Rendered) -> list[str]:
    """What lies in a Secret lies nowhere else: not in the Serve configuration, a ConfigMap, a command line."""
    hidden: dict[str, str] = {}
    for secret in rendered.of("Secret"):
        told = {**secret.get("stringData", {})}
        told |= {name: base64.b64decode(value).decode() for name, value in secret.get("data", {}).items()}
        hidden |= {f"{where(secret)} {name}": value for name, value in told.items() if len(value) >= SECRET_LENGTH}
    faults = []
    for manifest in rendered.manifests:
        if manifest["kind"] == "Secret":
            continue
        for path, value in leaves(manifest):
            faults += [
                f"{where(manifest)}: {path[-1]} tells {name}" for name, each in hidden.items() if each in str(value)
            ]
    return faults + [f"NOTES tell {name}" for name, each in hidden.items() if each in rendered.notes]


def patience(rendered: Rendered) -> list[str]:
    """A replica that is told to stop finishes its jobs: the pod has to wait for it, and so has the old cluster. What a
    pod does before its end counts into its grace, and nothing may come after."""
    settings = rendered.args
    drains = [settings.get("diffusion", {}).get("drain_s", 120.0), settings.get("http", {}).get("drain_s", 5.0)]
    drains += [each["drain_s"] for each in settings.get("placements", {}).values() if "drain_s" in each]
    faults = []
    for group in rendered.cluster["workerGroupSpecs"]:
        grace = group["template"]["spec"].get("terminationGracePeriodSeconds", 30)
        if grace <= max(drains):
            faults.append(f"Ray pods {group['groupName']}: {grace} s of grace for a drain of {max(drains):g} s")
    for pods in pods_of([rendered.service]):
        if "redis cleanup" in pods.where:
            continue
        grace = pods.spec.get("terminationGracePeriodSeconds", 30)
        for container in pods.containers:
            command = " ".join(container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ()))
            waits = [int(each) for each in re.findall(r"\b(?:timeout|sleep) (\d+)", command)]
            if not waits and container["name"].startswith("ray-"):
                faults.append(f"{pods.where}: nothing is done before its end, so its replicas are not moved")
            if waits and sum(waits) >= grace:
                faults.append(f"{pods.where}: its end is prepared for {sum(waits)} s, and it has {grace} s of grace")
            if waits and max(waits) < max(drains):
                faults.append(f"{pods.where}: its end is prepared for {max(waits)} s, and a drain is {max(drains):g} s")
    delay = rendered.service["spec"].get("rayClusterDeletionDelaySeconds", 60)
    if delay <= max(drains):
        faults.append(f"{where(rendered.service)}: the old cluster stays {delay} s for a drain of {max(drains):g} s")
    return faults


def selects(selector: Mapping[str, Any], given: Mapping[str, str]) -> bool:
    """Whether a label selector of Kubernetes takes a pod with these labels. An empty one takes every pod."""
    for name, value in selector.get("matchLabels", {}).items():
        if given.get(name) != value:
            return False
    for each in selector.get("matchExpressions", ()):
        has = each["key"] in given
        within = has and given[each["key"]] in each.get("values", ())
        wanted = {"In": within, "NotIn": not within, "Exists": has, "DoesNotExist": not has}
        if not wanted[each["operator"]]:
            return False
    return True


def _volumes(pods: Pods) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = pods.spec.get("volumes", ())
    return found


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (resources, security, tokens, images, budgets, scaled, names, labels, secrecy, patience)
}


def stateful_claims(manifests: Sequence[Manifest]) -> dict[str, set[str]]:
    """Names of the volumes that a StatefulSet claims for its pods, by the StatefulSet."""
    return {
        where(each): {claim["metadata"]["name"] for claim in at(each, ("spec",)).get("volumeClaimTemplates", ())}
        for each in manifests
        if each["kind"] == "StatefulSet"
    }
