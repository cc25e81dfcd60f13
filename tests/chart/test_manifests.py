"""Everything that the chart renders, for each of its examples: known to Kubernetes, and by the rules of the house."""

from collections.abc import Callable

import pytest
from support.chart import CI, CI_BAD, Rendered, lint, pods_of, render, strict_yaml, values_of
from support.chart_kuberay import operator_rules
from support.chart_links import LINKS
from support.chart_rules import RULES, selects
from support.chart_schemas import CRD_FOLDER, VERSIONS, crd_faults, crd_folder, schema_faults

EXAMPLES = {
    "external-services",
    "heterogeneous",
    "minimal-cpu",
    "monitoring",
    "network-policy",
    "scale-to-zero",
    "upgrade",
}


def test_each_use_of_the_chart_has_an_example() -> None:
    assert {file.name.removesuffix("-values.yaml") for file in CI} >= EXAMPLES
    assert CI_BAD


def test_lint_has_nothing_to_say() -> None:
    for file in CI:
        assert lint(values_of(file)) == [], file.name


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(release: Rendered, version: str) -> None:
    assert schema_faults(release.manifests, version) == []


@pytest.mark.parametrize("rule", {**RULES, **LINKS}.values(), ids={**RULES, **LINKS})
def test_house_rule(release: Rendered, rule: Callable[[Rendered], list[str]]) -> None:
    assert rule(release) == []


def test_the_operator_would_take_it(release: Rendered) -> None:
    assert operator_rules(release.service) == []


@pytest.mark.skipif(crd_folder() is None, reason=f"{CRD_FOLDER} names no folder with KubeRay's ray.io_rayservices.yaml")
def test_kuberays_own_definition_has_every_field(release: Rendered) -> None:
    folder = crd_folder()
    assert folder is not None
    assert crd_faults(release.manifests, folder) == []


def test_the_settings_of_the_pods_are_those_of_the_application(release: Rendered) -> None:
    """`kubectl exec ... tandem jobs` looks where the server looks."""
    (config,) = [each for each in release.of("ConfigMap") if "tandem.yaml" in each["data"]]
    assert strict_yaml(config["data"]["tandem.yaml"]) == release.args
    for group in (release.cluster["headGroupSpec"], *release.cluster["workerGroupSpecs"]):
        (container, *_) = group["template"]["spec"]["containers"]
        variables = {each["name"]: each.get("value") for each in container["env"]}
        folder, _, name = str(variables["TANDEM_CONFIG"]).rpartition("/")
        assert name == "tandem.yaml"
        (mount,) = [each["name"] for each in container["volumeMounts"] if each["mountPath"] == folder]
        (volume,) = [each for each in group["template"]["spec"]["volumes"] if each["name"] == mount]
        assert volume["configMap"]["name"] == config["metadata"]["name"]


def test_all_pods_of_ray_have_the_same_secrets(release: Rendered) -> None:
    """Serve hands a secret setting on by the name of its variable."""
    told = []
    for group in (release.cluster["headGroupSpec"], *release.cluster["workerGroupSpecs"]):
        env = group["template"]["spec"]["containers"][0]["env"]
        told.append([each for each in env if each["name"].startswith("TANDEM_")])
    assert all(each == told[0] for each in told)
    names = {each["name"] for each in told[0]}
    assert {"TANDEM_CONFIG", "TANDEM_KEYS__FIRST", "TANDEM_JOBS__REDIS_URL"} <= names


def test_the_notes_say_how_to_go_on(release: Rendered) -> None:
    name, namespace = release.service["metadata"]["name"], release.service["metadata"]["namespace"]
    assert f"kubectl -n {namespace} wait --for=condition=Ready rayservice/{name}" in release.notes
    doors = [*release.values["ingress"]["hosts"], *release.values["gateway"]["hostnames"], f"{name}-serve-svc"]
    if "serveService" not in release.service["spec"]:
        doors = [f"{name}-gateway"]
    assert any(door in release.notes for door in doors)
    assert ("test tandem" in release.notes) == any("helm.sh/hook" in str(pod) for pod in release.of("Pod"))


def test_another_release_stands_beside_it() -> None:
    """Two releases in one namespace share no name, and neither's selectors take the other's pods."""
    file = next(file for file in CI if file.name.startswith("minimal-cpu"))
    first, second = render(file), render(file, name="other")
    names = [{(each["kind"], each["metadata"]["name"]) for each in one.manifests} for one in (first, second)]
    assert not names[0] & names[1]
    others = pods_of(second.manifests)
    for manifest in first.manifests:
        spec = manifest.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector")
        if manifest["kind"] == "Service":
            selector = {"matchLabels": spec["selector"]}
        if isinstance(selector, dict) and {"matchLabels", "matchExpressions"} & selector.keys():
            taken = [pods.where for pods in others if selects(selector, pods.labels)]
            assert not taken, f"{manifest['kind']}/{manifest['metadata']['name']} takes {taken}"
