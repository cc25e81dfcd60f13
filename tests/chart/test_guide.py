"""docs/kubernetes.md and kubernetes-operations.md: their values render, and their commands name what a release has."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.chart import ROOT, Rendered, over, pods_of, put, render, strict_yaml
from support.chart_ray import Autoscaler, Deployment
from support.chart_rules import quantity, selects
from support.chart_values import NEEDED

from serve.placements import GPU_CLASS_LABEL

PAGES = [ROOT / "docs" / "kubernetes.md", ROOT / "docs" / "kubernetes-operations.md"]
PAGE = "\n".join(each.read_text(encoding="utf-8") for each in PAGES)
BLOCKS = {
    name: re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)
    for indent, name, text in re.findall(r"^( *)<!-- values: (\w+) -->\n *```yaml\n(.*?)^ *```$", PAGE, re.M | re.S)
}
COMMANDS = [
    line
    for block in re.findall(r"^ *```sh\n(.*?)^ *```$", PAGE, re.MULTILINE | re.DOTALL)
    for line in re.sub(r"\\\n\s*", "", block).splitlines()
]
NAMED = re.findall(r"`([^`]*)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
"""What stands in the running text as code."""
TOLD = "\n".join([*COMMANDS, *NAMED])
KUBERAYS = {"tandem-serve-svc", "tandem-head-svc", "tandem-gateway"}
"""What the operator makes of a RayService called tandem: two services and, for upgrades in steps, a Gateway."""
CLUSTERS = {"ray.io/originated-from-cr-name": "tandem"}
"""The operator's label on a RayService's clusters."""


def release(values: Mapping[str, Any]) -> Rendered:
    return render(over(NEEDED, values), name="tandem", namespace="tandem")


def releases() -> list[Rendered]:
    return [release({}), *(release(strict_yaml(block)) for block in BLOCKS.values())]


def names() -> set[str]:
    found = set(KUBERAYS)
    for rendered in releases():
        for manifest in rendered.manifests:
            name = manifest["metadata"]["name"]
            found.add(name)
            if manifest["kind"] == "StatefulSet":
                claims = [each["metadata"]["name"] for each in manifest["spec"]["volumeClaimTemplates"]]
                found |= {f"{name}-0", *(f"{claim}-{name}-0" for claim in claims)}
    return found | {name for name, _ in created()}


def created() -> set[tuple[str, str]]:
    """(Secret, key) that the page has made."""
    found = (re.match(r"kubectl create secret generic (\S+)", command) for command in COMMANDS)
    return {
        (match[1], key) for match in found if match for key in re.findall(r"--from-literal=([\w.-]+)=", match.string)
    }


def read() -> Iterator[tuple[str, str]]:
    """(Secret, key) that the pods of the page's values read, where the chart does not make the Secret."""
    for rendered in releases():
        made = {each["metadata"]["name"] for each in rendered.of("Secret")}
        for pods in pods_of(rendered.manifests):
            for container in pods.containers:
                for variable in container.get("env", ()):
                    ref = variable.get("valueFrom", {}).get("secretKeyRef")
                    if ref is not None and ref["name"] not in made:
                        yield ref["name"], ref["key"]


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_the_values_render(block: str) -> None:
    assert release(strict_yaml(block)).service["metadata"]["name"] == "tandem"


def test_every_values_block_is_marked() -> None:
    """One that is no manifest and not marked would not be rendered."""
    blocks = re.findall(r"^ *```yaml\n(.*?)^ *```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len([each for each in blocks if "apiVersion:" not in each]) == len(BLOCKS)


def test_the_helm_commands_render() -> None:
    headed = (re.match(r"# (\S+)\n", each) for each in BLOCKS.values())
    files = {match[1]: strict_yaml(match.string) for match in headed if match}
    seen = 0
    for words in (shlex.split(line, comments=True) for line in COMMANDS if re.match(r"helm (install|upgrade)", line)):
        if "helm/tandem" not in words:
            continue
        values: dict[str, Any] = {}
        for option, given in pairwise(words):
            if option == "-f":
                values = over(values, files[given])
            elif option in ("--set", "--set-string"):
                path, _, value = given.partition("=")
                values = put(values, tuple(path.split(".")), value if option != "--set" else strict_yaml(value))
        render(values, name="tandem", namespace="tandem")
        seen += 1
    assert seen >= 5


def test_secrets_are_made_before_they_are_read() -> None:
    wanted = set(read())
    assert {name for name, _ in wanted} >= {"tandem-bucket", "hub", "tandem-own-key"}
    assert wanted <= created()
    assert created() <= wanted, "made, and read by no pod"


def test_what_is_named_exists() -> None:
    """Of the release's things: what begins with its name."""
    known = names()
    told = {
        word for word in re.findall(r"[^\s/\"=]+", TOLD) if re.fullmatch(r"(data-)?tandem-[a-z0-9-]*[a-z0-9]", word)
    }
    told |= set(re.findall(r"\b(?:rayservice|raycluster)[ /](tandem\S*)", TOLD))
    assert len(told) > 12
    assert told <= known
    assert set(re.findall(r"persistentVolumeClaimName: ([\w-]+)", PAGE)) <= known


def test_selectors_find_pods() -> None:
    found = set(re.findall(r"(?<!grep )-l ([\w./=,-]+)", TOLD))
    assert len(found) > 4
    everything = [pods for rendered in releases() for pods in pods_of(rendered.manifests)]
    for selector in found:
        labels = dict(pair.split("=") for pair in selector.split(","))
        if labels != CLUSTERS:
            assert any(selects({"matchLabels": labels}, pods.labels) for pods in everything), selector


def test_containers_exist() -> None:
    told = set(re.findall(r"\bkubectl (?:exec|logs)[^\n]*? -c ([\w-]+)", TOLD))
    assert told == {"ray-head", "ray-worker", "autoscaler"}
    ours = {each["name"] for pods in pods_of(release({}).manifests) for each in pods.containers}
    assert told - {"autoscaler"} <= ours, "KubeRay puts the autoscaler beside the head, the others are the chart's"


KUBECTL = """#!/bin/sh
case "$*" in
"get rayservice tandem -o jsonpath="*) echo "$SERVES $COMES" ;;
"get pod -o name -l ray.io/cluster="*",ray.io/node-type=head --field-selector=status.phase=Running")
    cluster=${6#ray.io/cluster=}; echo "pod/${cluster%%,*}-head" ;;
*) echo "$*" ;;
esac
"""
"""Answers the two questions of `on_head`, and says what else it is asked for."""


@pytest.mark.parametrize(
    ("serves", "comes", "given", "head"),
    [
        ("tandem-old", "", "", "tandem-old"),
        ("tandem-old", "tandem-new", "", "tandem-old"),
        ("tandem-old", "tandem-new", "tandem-new", "tandem-new"),
        ("", "tandem-first", "", "tandem-first"),
    ],
)
def test_on_head_asks_the_cluster_that_serves(tmp_path: Path, serves: str, comes: str, given: str, head: str) -> None:
    (block,) = re.findall(r"^clusters\(\) \{.*?^on_head\(\) \{.*?^\}$", PAGE, re.MULTILINE | re.DOTALL)
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL, encoding="utf-8")
    kubectl.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SERVES": serves, "COMES": comes}
    done = subprocess.run(
        ["bash", "-euc", f"{block}\n{f'CLUSTER={given} ' if given else ''}on_head serve status"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == f"exec -i -c ray-head pod/{head}-head -- serve status"


def test_the_named_alerts_exist() -> None:
    rules = (ROOT / "helm" / "tandem" / "files" / "rules" / "tandem.yaml").read_text(encoding="utf-8")
    told = set(re.findall(r"\bTandem[A-Z]\w+", PAGE))
    assert told
    assert told <= set(re.findall(r"alert: (\w+)", rules))


def test_the_image_takes_the_arguments() -> None:
    told = set(re.findall(r"--build-arg (\w+)", PAGE))
    assert told >= {"TORCH_CUDA_INDEX", "EXTRA_PACKAGES"}
    assert told <= set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_time_for_a_node_is_the_charts() -> None:
    (told,) = re.findall(r"`ray\.autoscaler\.allocateTimeoutSeconds` \((\d+)\)", PAGE)
    assert int(told) == release({}).values["ray"]["autoscaler"]["allocateTimeoutSeconds"]


def test_the_patch_of_a_cluster_that_lives_meets_its_group() -> None:
    groups = release(strict_yaml(BLOCKS["cards"])).cluster["workerGroupSpecs"]
    tested = re.findall(r'"op": "test", "path": "/spec/workerGroupSpecs/(\d)/groupName", "value": "([\w-]+)"', PAGE)
    ((number, name),) = tested
    assert groups[int(number)]["groupName"] == name
    (path,) = re.findall(r'"op": "replace", "path": "/spec/workerGroupSpecs/(\d/\w+)"', PAGE)
    index, field = path.split("/")
    assert index == number
    assert field in groups[int(index)]


def test_the_autoscaler_starts_the_cards_that_the_page_counts() -> None:
    rendered = release(strict_yaml(BLOCKS["cards"]))
    config = rendered.args
    placements = [config["diffusion"] | each for each in config["placements"].values()]
    denoisers = [
        Deployment(
            each["model"],
            {"CPU": each["num_cpus"], "GPU": each["num_gpus"]},
            {GPU_CLASS_LABEL: each["gpu_class"]},
            each["replicas"],
        )
        for each in placements
    ]
    assert sum(each.most for each in denoisers) == 7
    answer = Autoscaler(rendered.service).asked_for(*denoisers)
    assert answer.starts == {"gpu-4gb": 3, "gpu-11gb": 3}
    assert answer.infeasible == 0


def test_the_named_values_exist() -> None:
    """`redis.jobs.existingSecret` and the like in the running text."""
    rendered = release(strict_yaml(BLOCKS["cards"]))
    rooms = {key for key in rendered.values if isinstance(rendered.values[key], dict)} - {"config"}
    paths = {each.split(":")[0] for each in NAMED if re.fullmatch(r"(\w+\.)+\w+(: .*)?", each)}
    ours = {path for path in paths if path.partition(".")[0] in rooms}
    assert len(ours) > 20
    for path in ours:
        node: Any = rendered.values
        for step in path.split("."):
            assert step in node, path
            node = node[step]


def test_what_the_first_installation_requests() -> None:
    total = {"cpu": 0.0, "memory": 0.0}
    for pods in pods_of(release({}).manifests):
        for container in pods.containers if pods.owner.split("/")[0] != "Pod" else ():
            for name, amount in container["resources"]["requests"].items():
                total[name] += float(quantity(amount)) * (pods.least or 0)
    assert f"some {total['cpu']:.0f} CPUs and {total['memory'] / 2**30:.0f} GiB" in PAGE
