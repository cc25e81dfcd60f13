"""Ray's own view of the chart: its Serve configuration model with strict keys, the application that it builds, and its
autoscaler, which says what worker group starts for what deployment."""

from __future__ import annotations

import collections
import copy
import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import NodeState, NodeStatus, ResourceRequestByCount
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.core.generated.instance_manager_pb2 import Instance, NodeKind
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema
from support.chart import Manifest, Rendered
from support.chart_kuberay import as_stored

from deployments.app import build
from serve.placements import GPU_CLASS_LABEL

HEAD = "headgroup"


@dataclasses.dataclass(frozen=True)
class Deployment:
    """One deployment of the application: what a replica of it reserves, where, and how many there are at most."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    most: int
    avoids: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Labels of nodes that it takes only where there are no others."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """Of the autoscaler: nodes to start, by worker group, and what no group can hold."""

    starts: Mapping[str, int]
    infeasible: int


def serve_faults(config: Mapping[str, Any]) -> list[str]:
    """Ray takes a Serve configuration with misspelt keys and ignores them: here each must be a field of its model."""
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        return [f"serveConfigV2 {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
    return [f"serveConfigV2: {place} is no field of Ray Serve" for place in _unknown(config, ServeDeploySchema, "")]


def _unknown(given: Any, model: type[BaseModel], place: str) -> Iterator[str]:
    fields = {**model.model_fields, **{each.alias: each for each in model.model_fields.values() if each.alias}}
    for name, value in given.items():
        if name not in fields:
            yield f"{place}{name}"
            continue
        for inner in _models(fields[name].annotation):
            if isinstance(value, Mapping):
                yield from _unknown(value, inner, f"{place}{name}.")
            for index, each in enumerate(value if isinstance(value, list) else ()):
                yield from _unknown(each, inner, f"{place}{name}.{index}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models(inner)


def deployments_of(args: Mapping[str, Any]) -> list[Deployment]:
    """The application as Ray Serve builds it, without starting anything."""
    built = build_app(build(args), name="tandem")
    return [_deployment(each) for each in built.deployments]


def _deployment(deployment: Any) -> Deployment:
    config, options = deployment._deployment_config, deployment._replica_config.ray_actor_options
    scaling = config.autoscaling_config
    selector = options.get("label_selector") or {}
    resources = {"CPU": options.get("num_cpus", 1) or 0, "GPU": options.get("num_gpus", 0) or 0}
    if options.get("memory"):
        resources["memory"] = options["memory"]
    resources |= options.get("resources") or {}
    return Deployment(
        name=deployment.name,
        resources={name: amount for name, amount in resources.items() if amount},
        labels={key: value for key, value in selector.items() if not value.startswith("!")},
        avoids={key: _listed(value) for key, value in selector.items() if value.startswith("!")},
        most=scaling.max_replicas if scaling else config.num_replicas,
    )


def _listed(selector: str) -> tuple[str, ...]:
    """The values of `!in(a, b)`."""
    return tuple(each.strip() for each in selector.removeprefix("!in(").removesuffix(")").split(","))


class Autoscaler:
    """Ray's autoscaler over one rendered RayService: a head that runs, and no worker yet."""

    def __init__(self, service: Manifest, *, from_zero: bool = True) -> None:
        cluster = copy.deepcopy(as_stored(service))
        for group in cluster["spec"]["workerGroupSpecs"] if from_zero else ():
            group["minReplicas"] = 0
        self.config = AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(cluster), skip_content_hash=True)

    def asked_for(self, *deployments: Deployment) -> Answer:
        """What it does when all replicas of these deployments wait for a place at once."""
        kinds = self.config.get_node_type_configs()
        head = kinds[HEAD]
        state = NodeState(node_id=b"head", instance_id="head", ray_node_type_name=HEAD, status=NodeStatus.RUNNING)
        for name, amount in head.resources.items():
            state.total_resources[name] = state.available_resources[name] = amount
        for name, value in head.labels.items():
            state.labels[name] = value
        running = Instance(
            instance_id="head",
            cloud_instance_id="head",
            instance_type=HEAD,
            status=Instance.RAY_RUNNING,
            node_kind=NodeKind.HEAD,
            node_id="head",
        )
        reply = ResourceDemandScheduler(None).schedule(
            SchedulingRequest(
                disable_launch_config_check=True,
                node_type_configs=kinds,
                max_num_nodes=self.config.get_max_num_nodes(),
                resource_requests=[_request(each) for each in deployments],
                current_instances=[AutoscalerInstance("head", state, running)],
            )
        )
        starts = collections.Counter({each.instance_type: each.count for each in reply.to_launch})
        return Answer(dict(starts), len(reply.infeasible_resource_requests))


def _request(deployment: Deployment) -> ResourceRequestByCount:
    equal = LabelSelectorOperator.LABEL_OPERATOR_IN
    selectors: list[list[Any]] | None = None
    if deployment.labels:
        selectors = [[(key, equal, [value]) for key, value in deployment.labels.items()]]
    elif deployment.avoids:
        unequal = LabelSelectorOperator.LABEL_OPERATOR_NOT_IN
        selectors = [[(key, unequal, [*values]) for key, values in deployment.avoids.items()], []]
    request = ResourceRequestUtil.make(dict(deployment.resources), label_selectors=selectors)
    return ResourceRequestByCount(request=request, count=deployment.most)


def astray(release: Rendered, deployments: list[Deployment]) -> list[str]:
    """Deployments for which the autoscaler starts nothing, or a node of another group than the values mean."""
    scaler, faults = Autoscaler(release.service), []
    for each in deployments:
        if not each.most:
            continue
        answer = scaler.asked_for(dataclasses.replace(each, most=1))
        meant = groups_for(release, each)
        if answer.infeasible or not answer.starts:
            faults.append(f"{each.name}: no group can hold {dict(each.resources)} with {dict(each.labels)}")
        elif not answer.starts.keys() <= meant:
            faults.append(f"{each.name}: starts {dict(answer.starts)}, meant is one of {sorted(meant)}")
    return faults


def groups_for(release: Rendered, deployment: Deployment) -> set[str]:
    """Worker groups that the values mean for a deployment: those of its class, else any with GPUs where it reserves
    one, else those without. Where all have GPUs, all."""
    groups = release.values["workerGroups"]
    classes = release.args.get("gpu_classes", {})
    if GPU_CLASS_LABEL in deployment.labels:
        label = deployment.labels[GPU_CLASS_LABEL]
        named = {name for name in classes if (classes[name].get("label") or name) == label}
        return {each["name"] for each in groups if each.get("gpuClass") in named}
    if deployment.resources.get("GPU"):
        return {each["name"] for each in groups if each.get("gpus")}
    plain = {each["name"] for each in groups if not each.get("gpus")}
    return plain or {each["name"] for each in groups}
