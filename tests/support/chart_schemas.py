"""Manifests against the schemas of Kubernetes (packaged, several versions, strict) and of the four custom kinds that
the chart writes: closed schemas of our own, and the real ones of KubeRay where `KUBERAY_CRD_DIR` names their folder."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from support.chart import ROOT, Manifest, dotted, leaves, where

VERSIONS = ("1.33", "1.35", "1.37")
OWN = {
    ("ray.io/v1", "RayService"): "rayservice.json",
    ("monitoring.coreos.com/v1", "PodMonitor"): "podmonitor.json",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "prometheusrule.json",
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): "httproute.json",
}
SCHEMAS = ROOT / "tests" / "chart" / "schemas"
CRD_FOLDER = "KUBERAY_CRD_DIR"
LONGEST = 200
"""Characters of a complaint: some quote the whole manifest."""


def schema_faults(manifests: Iterable[Manifest], version: str) -> list[str]:
    """Every error of every manifest; a kind that no schema knows is one, and so is a null."""
    faults = []
    for manifest in manifests:
        place = where(manifest)
        validator = _validator(manifest["apiVersion"], manifest["kind"], version)
        if validator is None:
            faults.append(f"{place}: Kubernetes {version} has no {manifest['apiVersion']} {manifest['kind']}")
            continue
        faults += _told(place, validator, manifest)
        faults += [f"{place}: {dotted(path)} is null" for path, value in leaves(manifest) if value is None]
    return faults


def crd_faults(manifests: Iterable[Manifest], folder: Path) -> list[str]:
    """Against KubeRay's own definition of a RayService, closed at every level."""
    validator = _crd(folder / "ray.io_rayservices.yaml")
    return [each for one in manifests if one["kind"] == "RayService" for each in _told(where(one), validator, one)]


def crd_folder() -> Path | None:
    given = os.environ.get(CRD_FOLDER)
    return Path(given) if given else None


def own_schema(kind: str) -> dict[str, Any]:
    (file,) = [name for (_, known), name in OWN.items() if known == kind]
    found: dict[str, Any] = json.loads((SCHEMAS / file).read_text(encoding="utf-8"))
    return found


def _told(place: str, validator: Draft202012Validator, manifest: Manifest) -> list[str]:
    return [f"{place}: {dotted(each.path)}: {each.message[:LONGEST]}" for each in validator.iter_errors(manifest)]


@functools.lru_cache(maxsize=256)
def _validator(api_version: str, kind: str, version: str) -> Draft202012Validator | None:
    own = OWN.get((api_version, kind))
    if own is not None:
        schema = json.loads((SCHEMAS / own).read_text(encoding="utf-8"))
    else:
        group, _, number = api_version.rpartition("/")
        name = "-".join(filter(None, (kind.lower(), group.partition(".")[0], number)))
        file = _packaged(version) / f"{name}.json"
        if not file.is_file():
            return None
        schema = json.loads(file.read_text(encoding="utf-8"))
        told = schema["x-kubernetes-group-version-kind"]
        # The packaged files are named by the first part of the API group alone.
        if {"group": group, "kind": kind, "version": number} not in told:
            return None
    return Draft202012Validator(schema, registry=_registry(version))


@functools.lru_cache(maxsize=4)
def _registry(version: str) -> Registry[Any]:
    definitions = json.loads((_packaged(version) / "_definitions.json").read_text(encoding="utf-8"))
    return Resource.from_contents(definitions) @ Registry()


def _packaged(version: str) -> Path:
    """The newest patch of this version that the package has; a version that it lacks is no reason to pass."""
    folder = Path(str(files("kubernetes_validate") / "kubernetes-json-schema"))
    found = sorted(folder.glob(f"v{version}.*-local-strict"))
    assert found, f"kubernetes-validate has no schemas of Kubernetes {version}"
    return found[-1]


@functools.lru_cache(maxsize=1)
def _crd(file: Path) -> Draft202012Validator:
    definition = yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)
    (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    # What Kubernetes itself fills into each object is no part of the definition.
    schema["properties"]["metadata"] = {"type": "object"}
    return Draft202012Validator(schema)


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes as JSON schema that lets no unknown field in."""
    made = {name: value for name, value in schema.items() if not name.startswith("x-")}
    for name in ("format", "description", "default"):
        made.pop(name, None)
    if schema.get("x-kubernetes-int-or-string"):
        made = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if "properties" in made:
        made["properties"] = {name: closed(value) for name, value in made["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    if isinstance(made.get("items"), Mapping):
        made["items"] = closed(made["items"])
    if isinstance(made.get("additionalProperties"), Mapping):
        made["additionalProperties"] = closed(made["additionalProperties"])
    return made


def custom_definition(api_version: str, kind: str) -> dict[str, Any]:
    """A definition for an API server that takes any object of this kind: its fields are checked elsewhere."""
    group, _, version = api_version.rpartition("/")
    plural = re.sub(r"y$", "ie", kind.lower()) + "s"
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return copy.deepcopy(
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            # Kubernetes keeps groups of its own name for definitions that it has approved.
            "metadata": {
                "name": f"{plural}.{group}",
                "annotations": {"api-approved.kubernetes.io": "unapproved, a test"},
            },
            "spec": {
                "group": group,
                "scope": "Namespaced",
                "names": {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"},
                "versions": [
                    {
                        "name": version,
                        "served": True,
                        "storage": True,
                        "schema": {"openAPIV3Schema": anything},
                        "subresources": {"status": {}},
                    }
                ],
            },
        }
    )
