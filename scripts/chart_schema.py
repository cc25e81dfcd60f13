"""Writes helm/tandem/values.schema.json, the form of the chart's values; with --check it only says if that is in step.

What a value may be follows from its default in values.yaml, unless RULES says it. The schema of `config` comes from the
settings tree, so that a misspelt setting is refused before anything reaches a cluster. Every table is closed, but for
those of Kubernetes (labels, affinity), which are empty by default. What two values say of each other is checked in
templates/_validate.tpl, and so is what belongs into no `config` (files/not-in-config.yaml): there the refusal can name
the way out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import yaml
from chart_values import CHART, Value, values
from pydantic import BaseModel, SecretStr

from serve.settings.pools import DiffusionSettings, EncoderSettings
from serve.settings.tree import Settings

Schema = dict[str, Any]
PAGE = CHART / "values.schema.json"
ELSEWHERE = CHART / "files" / "not-in-config.yaml"
NEWEST = "v1.37.0-local"
"""Of the versions of Kubernetes whose types kubernetes_validate brings along."""


def text(pattern: str | None = None) -> Schema:
    return {"type": "string"} | ({"pattern": pattern} if pattern else {})


def whole(least: int = 0, most: int | None = None) -> Schema:
    return {"type": "integer", "minimum": least} | ({} if most is None else {"maximum": most})


def number(least: float = 0, most: float | None = None) -> Schema:
    return {"type": "number", "minimum": least} | ({} if most is None else {"maximum": most})


def one_of(*choices: str) -> Schema:
    return {"type": "string", "enum": list(choices)}


def listed(entry: Schema) -> Schema:
    return {"type": "array", "items": entry}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def closed(fields: dict[str, Schema], *required: str) -> Schema:
    schema: Schema = {"type": "object", "additionalProperties": False, "properties": fields}
    return schema | ({"required": list(required)} if required else {})


def named(kind: str) -> Schema:
    """A type of Kubernetes' newest version by the names of its fields. What they hold is Kubernetes' to say."""
    page = files("kubernetes_validate") / f"kubernetes-json-schema/{NEWEST}/{kind}.json"
    known: dict[str, Any] = json.loads(page.read_text(encoding="utf-8"))["properties"]
    return closed({name: {} for name in known})


FREE: Schema = {"type": "object"}
PLAIN: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
AMOUNT = r"[0-9]+(\.[0-9]+)?(k|[KMGTPE]i|[MGTPE]|[eE][+-]?[0-9]+)?"
MEMORY = text(f"^{AMOUNT}$")
MEMORY_OR_NONE = text(f"^({AMOUNT})?$")
CPU: Schema = {"anyOf": [text(r"^[0-9]+(\.[0-9]+)?m?$"), {"type": "number", "exclusiveMinimum": 0}]}
URL = text(r"^$|^https?://[^\s/]+.*$")
REDIS_URL = text(r"^$|^rediss?://\S+$")


def kubernetes(fields: dict[str, Schema], *required: str) -> Schema:
    """An entry with Kubernetes' own fields: what is misspelt there, nobody refuses before pods are made. A null is a
    field that is not given."""
    return closed({name: one if name in required else or_null(one) for name, one in fields.items()}, *required)


def typed(schema: Schema, fields: dict[str, Schema]) -> Schema:
    return schema | {"properties": schema["properties"] | fields}


def key_ref() -> Schema:
    return kubernetes({"name": text(), "key": text(), "optional": FLAG}, "key")


FLAG: Schema = {"type": "boolean"}
SOURCES = {
    "fieldRef": kubernetes({"apiVersion": text(), "fieldPath": text()}, "fieldPath"),
    "resourceFieldRef": kubernetes(
        {"containerName": text(), "resource": text(), "divisor": {"type": ["string", "number"]}}, "resource"
    ),
    "configMapKeyRef": key_ref(),
    "secretKeyRef": key_ref(),
    "fileKeyRef": kubernetes({"volumeName": text(), "path": text(), "key": text(), "optional": FLAG}, "key"),
}
VARIABLE = text("^[-._A-Za-z][-._A-Za-z0-9]*$")
ENV = listed(kubernetes({"name": VARIABLE, "value": text(), "valueFrom": kubernetes(SOURCES)}, "name"))
TOLERATIONS = listed(
    kubernetes(
        {
            "key": text(),
            "operator": one_of("", "Exists", "Equal", "Lt", "Gt"),
            "value": text(),
            "effect": one_of("", "NoSchedule", "PreferNoSchedule", "NoExecute"),
            "tolerationSeconds": {"type": "integer"},
        }
    )
)
VOLUMES = listed(named("volume-v1") | {"required": ["name"]})
MOUNTS = listed(named("volumemount-v1") | {"required": ["name", "mountPath"]})
PULL = one_of("IfNotPresent", "Always", "Never")
OF_BOTH = {"runAsNonRoot": FLAG, "runAsUser": whole(), "runAsGroup": whole(), "seccompProfile": FREE}
OF_PODS = {"fsGroup": whole(), "fsGroupChangePolicy": one_of("OnRootMismatch", "Always")}
OF_CONTAINERS = {"allowPrivilegeEscalation": FLAG, "readOnlyRootFilesystem": FLAG, "capabilities": FREE}

RULES: dict[str, Schema] = {
    "*.cpu": CPU,
    "*.memory": MEMORY,
    "*.memoryLimit": MEMORY_OR_NONE,
    "*.shm": MEMORY,
    "*.storage": MEMORY,
    "*.pullPolicy": PULL,
    "*.annotations": PLAIN,
    "*.labels": PLAIN,
    "*.nodeSelector": PLAIN,
    "*.affinity": named("affinity-v1"),
    "*.tolerations": TOLERATIONS,
    "*.extraEnv": ENV,
    "commonLabels": PLAIN,
    "commonAnnotations": PLAIN,
    "nameOverride": text("^([a-z]([-a-z0-9]*[a-z0-9])?)?$"),
    "image.registry": text(r"^[^\s@]*$"),
    "image.tag": text(r"^[\w.-]*$"),
    "image.pullSecrets": listed(text()),
    "extraEnv": ENV,
    "extraVolumes": VOLUMES,
    "extraVolumeMounts": MOUNTS,
    "ray.version": text(r"^[0-9]+\.[0-9]+\.[0-9]+$"),
    "ray.autoscaler.upscalingMode": one_of("Default", "Conservative"),
    # At 0 a node would be given back before anything is placed on it.
    "ray.autoscaler.idleTimeoutSeconds": whole(1),
    "ray.autoscaler.allocateTimeoutSeconds": whole(1),
    "ray.upgrade.type": one_of("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
    "ray.upgrade.maxSurgePercent": whole(0, 100),
    "ray.upgrade.stepSizePercent": whole(0, 100),
    "ray.upgrade.intervalSeconds": whole(1),
    "workerDefaults.idle": or_null(whole(1)),
    "workerDefaults.priority": {"type": "integer"},
    "workerDefaults.topologySpreadConstraints": listed(named("topologyspreadconstraint-v1")),
    "workerDefaults.extraVolumes": VOLUMES,
    "workerDefaults.extraVolumeMounts": MOUNTS,
    "serve.keepAliveTimeoutSeconds": whole(1),
    "serve.requestTimeoutSeconds": whole(1),
    "service.type": one_of("ClusterIP", "NodePort", "LoadBalancer"),
    "service.port": whole(1, 65535),
    "service.loadBalancerSourceRanges": listed(text()),
    "ingress.hosts": listed(text()),
    "ingress.tls": listed(named("ingresstls-networking-v1")),
    "gateway.parentRefs": listed(
        closed({name: {} for name in ("group", "kind", "namespace", "name", "sectionName", "port")}, "name")
    ),
    "gateway.hostnames": listed(text()),
    "s3.endpointUrl": URL,
    "redis.jobs.url": REDIS_URL,
    "redis.cache.url": REDIS_URL,
    "redis.gcs.address": text(r"^$|^(rediss?://)?[^\s:/@]+:[0-9]+$"),
    "weights.size": MEMORY,
    "weights.accessMode": one_of("ReadWriteMany", "ReadWriteOnce"),
    "weights.preload.ttlSeconds": or_null(whole()),
    "scratch.sizeLimit": MEMORY,
    "networkPolicy.clients": listed(named("networkpolicypeer-networking-v1")),
    "networkPolicy.egress": listed(named("networkpolicyegressrule-networking-v1")),
    "networkPolicy.apiServerCidrs": listed(text()),
    "monitoring.podMonitor.interval": text("^[0-9]+(ms|s|m|h)$"),
    "monitoring.rules.cacheHitRatio": number(0, 1),
    "monitoring.rules.noReplicaFor": text("^[1-9][0-9]*(s|m|h)$"),
    "monitoring.rules.failedRatio": number(0, 1),
    "monitoring.rules.serverErrorRatio": number(0, 1),
    "monitoring.dashboards.labels": PLAIN,
    "podSecurityContext": typed(named("podsecuritycontext-v1"), OF_PODS | OF_BOTH),
    "containerSecurityContext": typed(named("securitycontext-v1"), OF_CONTAINERS | OF_BOTH),
    "extraObjects": listed({"type": ["string", "object"]}),
}
"""By the value's path, or for a name wherever it stands."""

GROUP_FIELDS: dict[str, Schema] = {
    "name": text(),
    "gpuClass": text(),
    "gpus": whole(0, 16),
    "gpuMemoryMiB": or_null(closed({"gt": whole(), "lt": whole()})),
    "cpu": CPU,
    "memory": MEMORY,
    "min": whole(),
    "max": whole(),
}
"""Of a worker group, beside those of `workerDefaults`. A long or wrong name is refused in _validate.tpl."""


def page() -> str:
    tree: Schema = closed({})
    told = {value.path: value for value in values()}
    for value in told.values():
        if "[]" not in value.path and value.path not in ("config", "workerGroups"):
            _put(tree, value.path.split("."), _schema(value), value.comment if value.group else "")
    defaults = tree["properties"]["workerDefaults"]["properties"]
    fields = {
        name: _described(schema, told, f"workerGroups[].{name}") for name, schema in (GROUP_FIELDS | defaults).items()
    }
    group = closed(fields, "name", "cpu", "memory", "min", "max")
    tree["properties"]["workerGroups"] = _described(listed(group) | {"minItems": 1}, told, "workerGroups")
    settings, definitions = config()
    tree["properties"]["config"] = _described(settings, told, "config")
    # What Helm itself adds, and what a parent chart may give to all its parts.
    tree["properties"]["global"] = FREE
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of the chart tandem"}
    return json.dumps(schema | tree | {"definitions": definitions}, indent=1, ensure_ascii=False) + "\n"


def config() -> tuple[Schema, Schema]:
    """The schema of the settings tree in draft 7, and the definitions that it refers to."""
    tree = Settings.model_json_schema(ref_template="#/definitions/{model}")
    definitions = tree.pop("$defs")
    for name, model in (("placements", DiffusionSettings), ("encoders", EncoderSettings)):
        field = tree["properties"][name]
        assert field["type"] == "object"
        field["additionalProperties"] = {"$ref": f"#/definitions/{model.__name__}"}  # no field of either is required
        assert not definitions[model.__name__].get("required")
    tree["properties"]["placements"]["propertyNames"] = {"pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]*$"}
    # Refused in _validate.tpl, with the way out.
    definitions["DiffusionSettings"]["properties"]["num_gpus"].pop("maximum")
    elsewhere = yaml.safe_load(ELSEWHERE.read_text(encoding="utf-8"))
    for path, way_out in elsewhere.items():
        _not_here(Settings, path.split("."), tree, definitions, way_out)
    if loose := [name for name in secrets(Settings) if name not in elsewhere]:
        raise SystemExit(f"helm/tandem/files/not-in-config.yaml: nothing about the secret {', '.join(loose)}")
    return _plain(tree), {name: _plain(one) for name, one in definitions.items()}


def secrets(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings that are secret."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from secrets(kind, f"{prefix}{name}.")
        elif "SecretStr" in str(kind) or kind is SecretStr:
            yield f"{prefix}{name}"


def _not_here(model: type[BaseModel], path: list[str], schema: Schema, definitions: Schema, way_out: str) -> None:
    """Anything may stand there: what refuses it is _validate.tpl."""
    name, *inner = path
    if not inner:
        if name not in schema["properties"]:
            raise SystemExit(f"helm/tandem/files/not-in-config.yaml: there is no setting {name}")
        schema["properties"][name] = {"description": f"Not here: {way_out}."}
        return
    kind = model.model_fields[name].annotation
    assert isinstance(kind, type)
    _not_here(kind, inner, definitions[kind.__name__], definitions, way_out)


def _plain(schema: Any) -> Any:
    """Without what only pydantic reads."""
    if isinstance(schema, list):
        return [_plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept: Schema = {}
    for name, one in schema.items():
        if name == "properties":
            kept[name] = {field: _plain(inner) for field, inner in one.items()}
        elif name == "description":
            kept[name] = " ".join(one.split())
        elif name not in ("title", "default", "format", "writeOnly"):
            kept[name] = _plain(one)
    return kept


def _schema(value: Value) -> Schema:
    if value.group:
        return closed({})
    leaf = value.path.split(".")[-1]
    rule = RULES.get(value.path) or (RULES.get(f"*.{leaf}") if "." in value.path else None)
    return (rule or _by_default(value)) | {"description": value.comment}


def _by_default(value: Value) -> Schema:
    match value.default:
        case bool():
            return FLAG
        case int():
            return whole()
        case float():
            return number()
        case str():
            return text()
    raise SystemExit(f"scripts/chart_schema.py: what may {value.path} be? Say it in RULES")


def _put(tree: Schema, path: list[str], schema: Schema, comment: str) -> None:
    for room in path[:-1]:
        tree = tree["properties"].setdefault(room, closed({}))
    if comment:
        schema |= {"description": comment}
    tree["properties"][path[-1]] = schema


def _described(schema: Schema, told: dict[str, Value], path: str) -> Schema:
    return schema | {"description": told[path].comment} if path in told else schema


def main() -> None:
    made = page()
    if "--check" not in sys.argv:
        PAGE.write_text(made, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != made:
        sys.exit("helm/tandem/values.schema.json is not in step with values.yaml and the settings: run `make fix`")


if __name__ == "__main__":
    main()
