"""The chart as Helm renders it (helm-python-sdk carries Helm itself; no cluster), and its manifests to be questioned.

Manifests are shared between tests: whoever changes one copies it first (`copy.deepcopy`).
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "tandem"
CI = sorted((CHART / "ci").glob("*-values.yaml"))
OVERLAYS = sorted((ROOT / "k8s" / "overlays").glob("*/values.yaml"))
CI_BAD = sorted((CHART / "ci-bad").glob("*.yaml"))
RELEASE = "tandem"
NAMESPACE = "images"
WARNING = 2
"""Of a lint message: 1 is information, 3 an error."""

Manifest = Mapping[str, Any]
Place = tuple[str | int, ...]


class Refused(Exception):
    """Helm did not render; its message."""


@dataclass(frozen=True, repr=False)
class Rendered:
    """What a release is: its manifests, hooks and test pods among them, the notes, the values that it was made from."""

    manifests: tuple[Manifest, ...]
    notes: str
    values: Mapping[str, Any]

    def of(self, kind: str) -> list[Manifest]:
        return [each for each in self.manifests if each["kind"] == kind]

    def one(self, kind: str) -> Manifest:
        (found,) = self.of(kind)
        return found

    @property
    def service(self) -> Manifest:
        return self.one("RayService")

    @property
    def cluster(self) -> Mapping[str, Any]:
        """What KubeRay makes a RayCluster of."""
        found: Mapping[str, Any] = self.service["spec"]["rayClusterConfig"]
        return found

    @property
    def serve_config(self) -> dict[str, Any]:
        return strict_yaml(self.service["spec"]["serveConfigV2"])

    @property
    def args(self) -> dict[str, Any]:
        """The settings tree of the application."""
        (application,) = self.serve_config["applications"]
        found: dict[str, Any] = application["args"]
        return found


@dataclass(frozen=True)
class Pods:
    """A pod template and how many there are of it: `least` is what always stays, None where it is not for us to say
    (a Job, a DaemonSet). `labels` are those that the pods have in the end."""

    where: str
    owner: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]
    least: int | None = None

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def is_ray(self) -> bool:
        return "ray.io/node-type" in self.labels

    @property
    def is_head(self) -> bool:
        return self.labels.get("ray.io/node-type") == "head"


def values_of(file: Path) -> dict[str, Any]:
    return strict_yaml(file.read_text(encoding="utf-8")) or {}


def over(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `base` with those of `top` over them, group by group; a list replaces a list, as in Helm."""
    merged = dict(base)
    for name, value in top.items():
        below = merged.get(name)
        merged[name] = over(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def put(values: Mapping[str, Any], path: Place, value: Any) -> dict[str, Any]:
    """A copy of the values with one of them changed or added."""
    copied: dict[str, Any] = json.loads(json.dumps(values))
    node: Any = copied
    for step in path[:-1]:
        node = node[step] if isinstance(step, int) else node.setdefault(step, {})
    node[path[-1]] = value
    return copied


def render(
    values: Path | Mapping[str, Any],
    *,
    chart: Path = CHART,
    name: str = RELEASE,
    namespace: str = NAMESPACE,
    upgrade: bool = False,
) -> Rendered:
    """Raises Refused with Helm's message. The same arguments are rendered once."""
    given = values_of(values) if isinstance(values, Path) else values
    return _render(chart, json.dumps(given, sort_keys=True), name, namespace, upgrade)


def rendered_anew(values: Mapping[str, Any], *, chart: Path = CHART) -> Rendered:
    """The same, not from memory: what is drawn by chance is drawn again."""
    return _render.__wrapped__(chart, json.dumps(values), RELEASE, NAMESPACE, False)


@functools.lru_cache(maxsize=512)
def _render(chart: Path, values: str, name: str, namespace: str, upgrade: bool) -> Rendered:
    given = json.loads(values)
    try:
        loaded = _chart(chart)
        loaded.validate_schema(given)
        files = loaded.render(given, name=name, namespace=namespace, is_upgrade=upgrade, is_install=not upgrade)
        merged = loaded.merge_values(given)
    except helm_python.HelmError as error:
        raise Refused(str(error)) from None
    manifests: list[Manifest] = []
    notes = ""
    for file, text in sorted(files.items()):
        if file.endswith("NOTES.txt"):
            notes = text
        elif file.endswith((".yaml", ".yml")):
            manifests += documents(text, file)
    return Rendered(tuple(manifests), notes, merged)


@functools.lru_cache(maxsize=64)
def _chart(folder: Path) -> helm_python.Chart:
    return helm_python.Chart.load(folder)


def lint(values: Mapping[str, Any], *, chart: Path = CHART) -> list[str]:
    """What `helm lint --strict` has to say. It raises nothing of its own accord."""
    report = helm_python.lint(chart, dict(values), strict=True, with_subcharts=True)
    told = [f"{each['path']}: {each['error']}" for each in report["messages"] if each["severity"] >= WARNING]
    return told + [each for each in report["errors"] if not any(each in line for line in told)]


def planted(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the chart in which `old` reads `new`. `old` must be there once, so that no fault is planted in vain."""
    copied = folder / "tandem"
    if not copied.exists():
        shutil.copytree(CHART, copied)
    path = copied / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return copied


def documents(text: str, file: str = "") -> Iterator[Manifest]:
    for document in yaml.load_all(text, _Strict):
        if document is not None:
            assert isinstance(document, dict), f"{file}: not a manifest: {document!r}"
            assert "kind" in document, f"{file}: a manifest without a kind"
            assert "apiVersion" in document, f"{file}: a manifest without an apiVersion"
            yield document


class _Strict(yaml.CSafeLoader):
    """YAML in which no key stands twice: a parser takes the last one, and nobody sees the first."""


def _mapping(loader: _Strict, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = {str(key) for key in keys if keys.count(key) > 1}
    assert not twice, f"twice in one mapping, {node.start_mark}: {sorted(twice)}"
    return {key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)}


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def strict_yaml(text: str) -> Any:
    return yaml.load(text, _Strict)


def where(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def leaves(node: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value that is not a group or list, and where it stands. An empty group or list is a value."""
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from leaves(value, (*path, name))
    elif isinstance(node, Sequence) and not isinstance(node, str) and node:
        for index, value in enumerate(node):
            yield from leaves(value, (*path, index))
    else:
        yield path, node


def at(node: Any, path: Iterable[str | int]) -> Any:
    """KeyError or IndexError where there is nothing."""
    for step in path:
        node = node[step]
    return node


def dotted(path: Iterable[str | int]) -> str:
    return ".".join(map(str, path))


def tells(message: str, path: Place) -> bool:
    """Whether Helm's message names the value: as its schema has it (`/a/0/b`), or as our templates (`a[0].b`)."""
    ours = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
    return ours in message or "/" + "/".join(map(str, path)) in message


def pods_of(manifests: Iterable[Manifest]) -> list[Pods]:
    """All pods that the manifests lead to, those of KubeRay with the labels and the container that it adds."""
    return [pods for manifest in manifests for pods in _pods(manifest)]


def _pods(manifest: Manifest) -> Iterator[Pods]:
    kind, name = manifest["kind"], where(manifest)
    if kind == "Pod":
        yield Pods(name, name, manifest["metadata"].get("labels", {}), manifest["spec"])
    elif kind in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
        least = manifest["spec"].get("replicas", 1) if kind in ("Deployment", "StatefulSet") else None
        yield _from_template(name, name, manifest["spec"]["template"], least)
    elif kind == "CronJob":
        yield _from_template(name, name, manifest["spec"]["jobTemplate"]["spec"]["template"], None)
    elif kind == "RayService":
        yield from _ray_pods(manifest)


def _ray_pods(service: Manifest) -> Iterator[Pods]:
    name, cluster = where(service), service["spec"]["rayClusterConfig"]
    labels = {
        "ray.io/is-ray-node": "yes",
        "ray.io/cluster": f"{service['metadata']['name']}-x2x4x",
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    head = cluster["headGroupSpec"]
    told = {**labels, **head.get("labels", {})}
    ours = {"ray.io/node-type": "head", "ray.io/group": "headgroup", "ray.io/serve": "false"}
    yield _from_template(f"{name} head", name, with_autoscaler(cluster), 1, told, ours)
    if "gcsFaultToleranceOptions" in cluster:
        ours = {"ray.io/node-type": "redis-cleanup", "ray.io/group": "headgroup"}
        yield _from_template(f"{name} redis cleanup", name, head["template"], None, told, ours)
    for group in cluster.get("workerGroupSpecs", ()):
        told = {**labels, **group.get("labels", {})}
        ours = {"ray.io/node-type": "worker", "ray.io/group": group["groupName"], "ray.io/serve": "true"}
        least = group.get("minReplicas", 0)
        yield _from_template(f"{name} {group['groupName']}", name, group["template"], least, told, ours)


def _from_template(
    name: str,
    owner: str,
    template: Mapping[str, Any],
    least: int | None,
    defaults: Mapping[str, str] | None = None,
    fixed: Mapping[str, str] | None = None,
) -> Pods:
    labels = {**(defaults or {}), **template.get("metadata", {}).get("labels", {}), **(fixed or {})}
    return Pods(name, owner, labels, template["spec"], least)


def with_autoscaler(cluster: Mapping[str, Any]) -> dict[str, Any]:
    """The head's pod template with the container that KubeRay adds to it."""
    template = dict(cluster["headGroupSpec"]["template"])
    if not cluster.get("enableInTreeAutoscaling"):
        return template
    options = cluster.get("autoscalerOptions", {})
    ours = {key: options[key] for key in ("resources", "securityContext", "volumeMounts", "env") if key in options}
    image = template["spec"]["containers"][0]["image"]
    added = {"name": "autoscaler", "image": options.get("image", image), **ours}
    return {**template, "spec": {**template["spec"], "containers": [*template["spec"]["containers"], added]}}
