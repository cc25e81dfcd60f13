"""What Ray makes of the chart: its Serve configuration is really built, and its own autoscaler is asked which worker
group it would start for each deployment."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._common.utils import import_attr
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from support import image_models
from support.chart import Rendered, dotted
from support.chart_ray import Autoscaler, Deployment, astray, deployments_of, serve_faults
from support.published_folders import published_model

from serve.catalog import open_catalog
from serve.origins import load_args
from serve.placements import GPU_CLASS_LABEL, plan_placements
from serve.rungs import Rung

FULL_HASH = re.compile(r"[0-9a-f]{40}")
MIB = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Family:
    """A small model with random weights in place of a published one, and that one's name in serve/memory."""

    make: Callable[[Path], Path]
    published: str


FAMILIES = {
    r"stable-diffusion-xl|sdxl|playground": Family(image_models.sdxl_model, "sdxl"),
    r"stable-diffusion-3": Family(image_models.sd3_model, "sd35-medium"),
    r"flux": Family(image_models.flux_model, "flux-dev"),
    r"stable-diffusion|sd-turbo|dreamshaper": Family(image_models.sd_model, "sd15"),
}
"""By what a hub id has in it; the first that fits."""
ENCODERS = {"clip-l": "clip-32x3", "openclip-bigg": "clip-48x2", "t5-xxl": "t5-96x2"}
"""Names of the published encoders, and of those of the small models: both come from their architecture."""


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Family]]:
    """The small model for a hub id, made once."""
    made: dict[str, Path] = {}

    def find(source: str) -> tuple[Path, Family]:
        pattern = next(each for each in FAMILIES if re.search(each, source.lower()))
        family = FAMILIES[pattern]
        if pattern not in made:
            made[pattern] = family.make(tmp_path_factory.mktemp("model") / "model")
        return made[pattern], family

    return find


@pytest.fixture
def tree(
    release: Rendered,
    stand_in: Callable[[str], tuple[Path, Family]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """The arguments of the application, with small models in place of those of the hub, in the pod's environment."""
    secrets = {
        "TANDEM_JOBS__REDIS_URL": "redis://:secret@redis-jobs:6379/0",
        "TANDEM_CACHE__REDIS_URL": "redis://:secret@redis-cache:6379/0",
        "TANDEM_WEBHOOKS__SECRET": "whsec_" + "A" * 32,
        "TANDEM_KEYS__FIRST": "tdm_" + "a" * 12 + "_" + "A" * 43,
    }
    for each in release.cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]:
        if each["name"] in secrets:
            monkeypatch.setenv(each["name"], secrets[each["name"]])
    args = {**release.args, "data_dir": str(tmp_path / "data")}
    for group in models_of(args):
        if is_hub_id(group.get("source", "shapes")):
            assert FULL_HASH.fullmatch(group.get("revision", "")), f"{group['source']} without a full commit hash"
            path, _ = stand_in(group["source"])
            name = group.get("name") or group["source"].rpartition("/")[2]
            group |= {"source": str(path), "name": name, "revision": None}
    return {**args, "encoders": {ENCODERS[name]: own for name, own in args.get("encoders", {}).items()}}


def models_of(args: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The groups of the settings that name a model; to be changed in place."""
    if "model" in args:
        yield args["model"]
    yield from args.get("models", ())
    yield from args.get("text_models", ())


def is_hub_id(source: str) -> bool:
    return "/" in source and not source.startswith(("/", "."))


@pytest.fixture
def deployments(tree: dict[str, Any]) -> list[Deployment]:
    return deployments_of(tree)


def test_every_key_is_a_field_of_ray_serve(release: Rendered) -> None:
    """Ray ignores one that is not."""
    assert serve_faults(release.serve_config) == []


def test_ray_serve_builds_the_application(release: Rendered, tree: dict[str, Any]) -> None:
    """By the way that Ray itself goes: from the import path, with arguments as plain values."""
    (application,) = release.serve_config["applications"]
    build = import_attr(application["import_path"])
    built = call_user_app_builder_with_args_if_necessary(build, tree)
    assert built._bound_deployment.name == "Ingress"
    settings = load_args(tree).settings
    assert settings.results.store == "s3"
    assert settings.results.s3.bucket


def test_every_class_holds_the_models_that_are_placed_on_it(
    release: Rendered, stand_in: Callable[[str], tuple[Path, Family]], tree: dict[str, Any], tmp_path: Path
) -> None:
    """With the sizes of the published models in place of the small ones': all of the weights and an image of the
    model's own size, in the memory of the class."""
    settings = load_args(tree).settings
    drawn = dict(open_catalog(settings).drawn)
    for given, small in zip(models_of(release.args), models_of(tree), strict=True):
        name = small.get("name")
        if name in drawn and is_hub_id(given.get("source", "shapes")):
            _, family = stand_in(given["source"])
            drawn[name] = published_model(tmp_path / name, family.published, called=name)
    for placement in plan_placements(settings, drawn):
        if placement.gpu_class is not None:
            assert placement.rung is Rung.RESIDENT, f"{placement.name} is drawn on the rung {placement.rung}"
            assert placement.plan is not None
            assert placement.plan.fits


def test_each_deployment_starts_a_node_of_its_own_group(release: Rendered, deployments: list[Deployment]) -> None:
    """From a cluster that has nothing but its head."""
    assert {"Ingress"} < {each.name for each in deployments}
    assert astray(release, deployments) == []


def test_all_replicas_that_there_may_ever_be_find_a_place(release: Rendered, deployments: list[Deployment]) -> None:
    answer = Autoscaler(release.service, from_zero=False).asked_for(*deployments)
    assert answer.infeasible == 0
    bounds = {each["groupName"]: each for each in release.cluster["workerGroupSpecs"]}
    for name, count in answer.starts.items():
        assert bounds[name]["minReplicas"] <= count <= bounds[name]["maxReplicas"]


def test_without_work_there_are_the_nodes_of_min_and_no_others(release: Rendered) -> None:
    wanted = {each["groupName"]: each["minReplicas"] for each in release.cluster["workerGroupSpecs"]}
    starts = Autoscaler(release.service, from_zero=False).asked_for().starts
    assert starts == {name: count for name, count in wanted.items() if count}


def test_a_label_that_no_group_has_is_told(release: Rendered) -> None:
    """So that the autoscaler is asked a question that it can answer with no."""
    lost = Deployment("Lost", {"CPU": 0.1}, {GPU_CLASS_LABEL: "nobody-has-it"}, 1)
    assert Autoscaler(release.service).asked_for(lost).infeasible == 1


def test_models_lie_where_every_replica_finds_them(release: Rendered) -> None:
    """`data_dir` and the hub's cache are on the one volume."""
    for group in (release.cluster["headGroupSpec"], *release.cluster["workerGroupSpecs"]):
        (container, *_) = group["template"]["spec"]["containers"]
        variables = {each["name"]: each.get("value", "") for each in container["env"]}
        paths = {each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")}
        assert release.args["data_dir"] in paths
        assert any(variables["HF_HOME"].startswith(f"{path}/") for path in paths)
        assert variables["HOME"] in paths


def test_pods_have_what_ray_counts_with(release: Rendered) -> None:
    """Ray tells its autoscaler's arithmetic from the limits of a pod, and the pod's from its resources: one number."""
    kinds = Autoscaler(release.service).config.get_node_type_configs()
    for given in release.values["workerGroups"]:
        found = kinds[given["name"]]
        assert found.resources.get("GPU", 0) == given.get("gpus", 0), given["name"]
        assert found.resources["CPU"] >= 1, dotted(("workerGroups", given["name"]))
        assert found.resources["memory"] >= 512 * MIB
        assert found.max_worker_nodes == given["max"]
        assert found.priority == given.get("priority", release.values["workerDefaults"]["priority"])
        idle = given.get("idle", release.values["workerDefaults"].get("idle"))
        assert found.idle_timeout_s == (None if idle is None else float(idle))
    assert kinds["headgroup"].resources["CPU"] == 0
