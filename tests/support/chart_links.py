"""What points at what in the chart: selectors at pods, references at Secrets, ports at containers, variables at
settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from support.chart import Manifest, Pods, Rendered, at, leaves, pods_of, where
from support.chart_rules import Rule, selects, stateful_claims

from serve.origins import flatten
from serve.settings.tree import ENV_DELIMITER, ENV_PREFIX, Settings

NO_SETTINGS = {f"{ENV_PREFIX}CONFIG", f"{ENV_PREFIX}KEY"}
"""Variables with the settings' prefix that the server knows beside them."""
GIVEN = ("existingSecret", "existingClaim")
"""Values that name something which the operator has made before."""


def services(rendered: Rendered) -> list[str]:
    """A Service leads to the pods of one workload, and to ports that they have."""
    faults, everything = [], pods_of(rendered.manifests)
    for service in rendered.of("Service"):
        spec, place = service["spec"], where(service)
        if spec.get("type") == "ExternalName":
            continue
        found = [pods for pods in everything if _takes(spec.get("selector", {}), pods)]
        if len({pods.owner for pods in found}) != 1:
            faults.append(f"{place}: leads to {sorted(pods.owner for pods in found) or 'no pods'}")
        for port in spec["ports"]:
            target = port.get("targetPort", port["port"])
            faults += [f"{place}: {pods.where} has no port {target}" for pods in found if not _has_port(pods, target)]
    return faults


def serve_service(rendered: Rendered) -> list[str]:
    """Of the Service that KubeRay makes for Serve it takes only ports that the head's container has, by their names."""
    custom = rendered.service["spec"].get("serveService")
    head = rendered.cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    serving = {each["name"] for each in head.get("ports", ()) if re.fullmatch(r"serve(-.*)?", each.get("name", ""))}
    if not serving:
        return ["Ray pods head: no port named `serve`, without which KubeRay makes no service"]
    if custom is None:
        return []
    faults = []
    told = {each.get("name"): each for each in custom["spec"].get("ports", ())}
    faults += [f"serveService: the head has no port {name}" for name in told if name not in serving]
    faults += [f"serveService: no port {name}" for name in sorted(serving - told.keys())]
    faults += ["serveService: a selector, which KubeRay ignores"] if "selector" in custom["spec"] else []
    for pods in pods_of([rendered.service]):
        if pods.labels["ray.io/node-type"] == "redis-cleanup":
            continue
        for port in told.values():
            target = port.get("targetPort", port["port"])
            faults += [] if _has_port(pods, target) else [f"serveService: {pods.where} has no port {target}"]
    return faults


def selectors(rendered: Rendered) -> list[str]:
    """Who selects pods selects some: a workload its own, a policy or a monitor any that are rendered."""
    faults, everything = [], pods_of(rendered.manifests)
    for manifest in rendered.manifests:
        kind, place, spec = manifest["kind"], where(manifest), manifest.get("spec", {})
        if kind in ("Deployment", "StatefulSet", "DaemonSet"):
            own = spec["template"]["metadata"].get("labels", {})
            faults += [] if selects(spec["selector"], own) else [f"{place}: its selector is not its pods'"]
            others = [
                pods.where for pods in everything if selects(spec["selector"], pods.labels) and pods.owner != place
            ]
            faults += [f"{place}: its selector takes {other} too" for other in others]
        if kind == "StatefulSet" and spec["serviceName"] not in _named(rendered, "Service"):
            faults.append(f"{place}: there is no Service {spec['serviceName']}")
        wanted = {"NetworkPolicy": "podSelector", "PodMonitor": "selector", "PodDisruptionBudget": "selector"}.get(kind)
        if wanted is None:
            continue
        found = [pods for pods in everything if selects(spec[wanted], pods.labels)]
        faults += [] if found else [f"{place}: selects no pods"]
        for end in spec.get("podMetricsEndpoints", ()):
            port = end.get("port", end.get("portNumber"))
            faults += [f"{place}: {pods.where} has no port {port}" for pods in found if not _has_port(pods, port)]
        if kind == "NetworkPolicy":
            faults += list(_policy(place, spec, everything, found))
    return faults


def _policy(place: str, spec: Mapping[str, Any], everything: Sequence[Pods], found: Sequence[Pods]) -> Iterator[str]:
    """Peers within the namespace are pods of ours, and what is let in is a port that the selected pods have."""
    for side, peers in (("ingress", "from"), ("egress", "to")):
        for rule in spec.get(side, ()):
            for peer in rule.get(peers, ()):
                if "podSelector" not in peer or "namespaceSelector" in peer or not peer["podSelector"]:
                    continue
                if not any(selects(peer["podSelector"], pods.labels) for pods in everything):
                    yield f"{place}: {side} names pods that are not rendered: {peer['podSelector']}"
            for port in rule.get("ports", ()) if side == "ingress" else ():
                number = port.get("port")
                if isinstance(number, str) and not any(_has_port(pods, number) for pods in found):
                    yield f"{place}: no selected pod has a port {number}"


def backends(rendered: Rendered) -> list[str]:
    """An Ingress and an HTTPRoute lead to the service that KubeRay makes, by the port that it has."""
    name, spec = rendered.service["metadata"]["name"], rendered.service["spec"]
    port = spec.get("serveService", {}).get("spec", {}).get("ports", [{"port": 8000, "name": "serve"}])[0]
    known = {(f"{name}-serve-svc", port["port"]), (f"{name}-serve-svc", port["name"])}
    for service in rendered.of("Service"):
        for each in service["spec"]["ports"]:
            known |= {(service["metadata"]["name"], each["port"]), (service["metadata"]["name"], each.get("name"))}
    faults = []
    for ingress in rendered.of("Ingress"):
        faults += [] if ingress["spec"].get("rules") else [f"{where(ingress)}: no rules"]
        for rule in ingress["spec"].get("rules", ()):
            for path in rule["http"]["paths"]:
                to = path["backend"]["service"]
                number = to["port"].get("number", to["port"].get("name"))
                faults += (
                    [] if (to["name"], number) in known else [f"{where(ingress)}: nothing at {to['name']}:{number}"]
                )
    for route in rendered.of("HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for to in rule["backendRefs"]:
                there = (to["name"], to["port"]) in known
                faults += [] if there else [f"{where(route)}: nothing at {to['name']}:{to['port']}"]
    return faults


def references(rendered: Rendered) -> list[str]:
    """Every Secret, ConfigMap, claim and service account that a pod names is rendered, or given in the values."""
    given = {str(value) for path, value in leaves(rendered.values) if path and path[-1] in GIVEN and value}
    given |= {str(value) for path, value in leaves(rendered.values) if _in_reference(path)}
    given |= {str(value) for value in rendered.values["image"]["pullSecrets"]}
    if not rendered.values["serviceAccount"]["create"]:
        given.add(rendered.values["serviceAccount"]["name"])
    made = {kind: _named(rendered, kind) for kind in ("Secret", "ConfigMap", "PersistentVolumeClaim", "ServiceAccount")}
    faults = []
    for pods in pods_of(rendered.manifests):
        for kind, name, key in _references(pods):
            if name in given:
                continue
            found = made[kind].get(name)
            if found is None:
                faults.append(f"{pods.where}: there is no {kind} {name}")
            elif key is not None and key not in {*found.get("data", {}), *found.get("stringData", {})}:
                faults.append(f"{pods.where}: {kind} {name} has no {key}")
    fault_tolerance = rendered.cluster.get("gcsFaultToleranceOptions", {})
    for _, ref in _refs(fault_tolerance, "secretKeyRef"):
        found = made["Secret"].get(ref["name"])
        if ref["name"] not in given and ref["key"] not in {
            **(found or {}).get("data", {}),
            **(found or {}).get("stringData", {}),
        }:
            faults.append(f"gcsFaultToleranceOptions: there is no {ref['key']} in a Secret {ref['name']}")
    return faults


def mounts(rendered: Rendered) -> list[str]:
    """Every mount has its volume, and no two of a container lie in the same place."""
    faults, claims = [], stateful_claims(rendered.manifests)
    for pods in pods_of(rendered.manifests):
        known = {each["name"] for each in pods.spec.get("volumes", ())} | claims.get(pods.owner, set())
        for container in pods.containers:
            given = container.get("volumeMounts", ())
            faults += [
                f"{pods.where}: there is no volume {each['name']}" for each in given if each["name"] not in known
            ]
            paths = [each["mountPath"].rstrip("/") for each in given]
            faults += [f"{pods.where}: two volumes at {path}" for path in {*paths} if paths.count(path) > 1]
    return faults


def variables(rendered: Rendered) -> list[str]:
    """Each TANDEM_* is a setting (the server refuses others, such as Kubernetes' service links of a release called
    tandem), no variable stands twice, and `$(NAME)` comes after NAME: Kubernetes expands them in order."""
    known = NO_SETTINGS | {ENV_PREFIX + name.upper().replace(".", ENV_DELIMITER) for name, _ in flatten(Settings())}
    faults = []
    for pods in pods_of(rendered.manifests):
        ours = [each for each in pods.containers if _is_ours(rendered, each)]
        if ours and pods.spec.get("enableServiceLinks") is not False:
            faults.append(f"{pods.where}: service links (enableServiceLinks) would be taken for settings")
        for container in pods.containers:
            place, before = f"{pods.where}, container {container['name']}", set()
            for each in container.get("env", ()):
                name = each["name"]
                faults += [f"{place}: {name} twice"] if name in before else []
                if name.startswith(ENV_PREFIX) and name not in known:
                    faults.append(f"{place}: {name} is no setting")
                for used in re.findall(r"(?<!\$)\$\(([A-Za-z0-9_]+)\)", each.get("value", "")):
                    faults += [] if used in before else [f"{place}: {name} uses {used}, which is not set before it"]
                before.add(name)
    return faults


def _is_ours(rendered: Rendered, container: Mapping[str, Any]) -> bool:
    image = rendered.values["image"]
    return str(container["image"]).startswith(f"{image['registry']}/{image['repository']}:")


def _takes(selector: Mapping[str, str], pods: Pods) -> bool:
    return bool(selector) and selects({"matchLabels": selector}, pods.labels)


def _has_port(pods: Pods, port: int | str | None) -> bool:
    return any(
        port in (each.get("name"), each["containerPort"]) for box in pods.containers for each in box.get("ports", ())
    )


def _named(rendered: Rendered, kind: str) -> dict[str, Manifest]:
    return {each["metadata"]["name"]: each for each in rendered.of(kind)}


def _in_reference(path: Sequence[str | int]) -> bool:
    """In the values: `valueFrom.secretKeyRef.name` of an extra variable, a volume's `secretName`, `claimName`, ..."""
    return len(path) > 1 and (
        path[-2:] in [(each, "name") for each in ("secretKeyRef", "configMapKeyRef", "configMap")]
    )


def _refs(node: Any, kind: str) -> Iterator[tuple[tuple[str | int, ...], Mapping[str, Any]]]:
    """Groups named `kind`, wherever they stand."""
    for path, _ in leaves(node):
        if kind in path:
            place = path[: path.index(kind) + 1]
            if path == (*place, "name"):
                yield place, at(node, place)


def _references(pods: Pods) -> Iterator[tuple[str, str, str | None]]:
    """(kind, name, key) of everything that a pod can't start without."""
    for kind, ref in (("Secret", "secretKeyRef"), ("ConfigMap", "configMapKeyRef")):
        for _, each in _refs(pods.spec, ref):
            if not each.get("optional"):
                yield kind, each["name"], each["key"]
    for kind, ref in (("Secret", "secretRef"), ("ConfigMap", "configMapRef")):
        for _, each in _refs(pods.spec, ref):
            yield kind, each["name"], None
    for volume in pods.spec.get("volumes", ()):
        if "secret" in volume and not volume["secret"].get("optional"):
            yield "Secret", volume["secret"]["secretName"], None
        if "configMap" in volume:
            keys: list[str | None] = [item["key"] for item in volume["configMap"].get("items", ())]
            for key in keys or [None]:
                yield "ConfigMap", volume["configMap"]["name"], key
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], None
    for each in pods.spec.get("imagePullSecrets", ()):
        yield "Secret", each["name"], None
    if pods.spec.get("serviceAccountName", "default") != "default":
        yield "ServiceAccount", pods.spec["serviceAccountName"], None


LINKS: dict[str, Rule] = {
    rule.__name__: rule for rule in (services, serve_service, selectors, backends, references, mounts, variables)
}
