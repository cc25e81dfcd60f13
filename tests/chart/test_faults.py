"""Faults that were once made somewhere, planted in a copy of the chart: each check finds its own."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.chart import CI, Rendered, over, planted, render, values_of
from support.chart_kuberay import operator_rules
from support.chart_links import LINKS
from support.chart_metrics import expressions, unknown_metrics
from support.chart_ray import Deployment, astray, serve_faults
from support.chart_rules import RULES, budgets, resources, scaled
from support.chart_schemas import VERSIONS, crd_faults, crd_folder, schema_faults
from support.chart_values import GIVEN, lost_zeros

from serve.placements import GPU_CLASS_LABEL

NEWEST = VERSIONS[-1]


def example(name: str) -> dict[str, Any]:
    (file,) = [each for each in CI if each.name == f"{name}-values.yaml"]
    return values_of(file)


def sound(rendered: Rendered) -> Rendered:
    """The release before a fault: what a check then says comes from the fault."""
    assert schema_faults(rendered.manifests, NEWEST) == []
    assert [*budgets(rendered), *resources(rendered), *scaled(rendered), *unknown_metrics(rendered)] == []
    assert operator_rules(rendered.service) == []
    return rendered


def test_a_lost_zero(tmp_path: Path) -> None:
    path = ("workerGroups", 0, "min")
    assert lost_zeros(path) == []
    fault = "minReplicas: {{ int ($group.min | default 1) }}"
    chart = planted(tmp_path, "templates/_ray.tpl", "minReplicas: {{ int $group.min }}", fault)
    (told,) = lost_zeros(path, chart)
    assert "workerGroups.0.min: 0 is lost" in told


@pytest.mark.parametrize("fault", ["minAvailable: 50%", "maxUnavailable: 1", "minAvailable: {{ int $group.min }}"])
def test_a_budget_that_blocks_every_eviction(tmp_path: Path, fault: str) -> None:
    groups = [{**each, "min": 3} for each in render(example("heterogeneous")).values["workerGroups"]]
    values = over(example("heterogeneous"), {"workerGroups": groups})
    assert sound(render(values)).of("PodDisruptionBudget")
    chart = planted(tmp_path, "templates/pdb.yaml", "minAvailable: {{ $least }}", fault)
    told = budgets(render(values, chart=chart))
    assert len(told) >= len(groups)
    assert all("PodDisruptionBudget" in each for each in told)


def test_replicas_of_something_that_is_scaled() -> None:
    before = sound(render(example("minimal-cpu")))
    (deployment, *_) = before.of("Deployment")
    assert "replicas" in deployment["spec"]
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment["metadata"]["name"]}
    labels = dict(deployment["metadata"]["labels"])
    scaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "scaler", "labels": labels},
        "spec": {"scaleTargetRef": target, "minReplicas": 1, "maxReplicas": 3},
    }
    after = render(over(example("minimal-cpu"), {"extraObjects": [scaler]}))
    assert schema_faults(after.manifests, NEWEST) == []
    (told,) = scaled(after)
    assert "has spec.replicas" in told


def test_a_label_that_no_group_carries(tmp_path: Path) -> None:
    values = example("heterogeneous")
    before = render(values)
    wanted = [
        Deployment(name, {"CPU": 0.5, "GPU": 0.25}, {GPU_CLASS_LABEL: name}, 1)
        for name in {each["gpuClass"] for each in before.values["workerGroups"] if each.get("gpuClass")}
    ]
    assert wanted
    assert astray(before, wanted) == []
    chart = planted(tmp_path, "templates/_ray.tpl", "\n  tandem.dev/gpu-class: {{", "\n  tandem.dev/gpu-kind: {{")
    told = astray(render(values, chart=chart), wanted)
    assert len(told) == len(wanted)
    assert all("no group can hold" in each for each in told)


def test_a_missing_cpu_request(tmp_path: Path) -> None:
    before = sound(render(example("heterogeneous")))
    chart = planted(tmp_path, "templates/_ray.tpl", "\n  cpu: {{ .cpu | quote }}", "")
    told = resources(render(example("heterogeneous"), chart=chart))
    assert len(told) >= 1 + len(before.cluster["workerGroupSpecs"])
    assert all("no cpu request" in each for each in told)


def test_a_typing_error_in_a_field_of_the_cluster(tmp_path: Path) -> None:
    values = example("heterogeneous")
    sound(render(values))
    chart = planted(tmp_path, "templates/_ray.tpl", "maxReplicas: {{", "maxReplica: {{")
    after = render(values, chart=chart)
    told = schema_faults(after.manifests, NEWEST)
    assert any("'maxReplica' was unexpected" in each for each in told)
    folder = crd_folder()
    if folder is not None:
        assert any("'maxReplica' was unexpected" in each for each in crd_faults(after.manifests, folder))


def test_a_typing_error_in_a_pod(tmp_path: Path) -> None:
    """Pod templates inside the RayService are checked by Kubernetes' own schema."""
    chart = planted(
        tmp_path,
        "templates/_ray.tpl",
        "    containers:\n      - name: ray-head",
        "    container:\n      - name: ray-head",
    )
    told = schema_faults([render(example("heterogeneous"), chart=chart).service], NEWEST)
    assert any("'container' was unexpected" in each for each in told)


def test_a_typing_error_in_the_serve_configuration(tmp_path: Path) -> None:
    values = example("minimal-cpu")
    chart = planted(tmp_path, "templates/_ray.tpl", "  request_timeout_s: {{", "  request_timeouts_s: {{")
    (told,) = serve_faults(render(values, chart=chart).serve_config)
    assert "http_options.request_timeouts_s" in told


def test_an_alert_on_a_metric_that_does_not_exist(tmp_path: Path) -> None:
    values = example("monitoring")
    assert any("ray_tandem_" in each for _, each in expressions(sound(render(values))))
    lost = "groups:\n- name: lost\n  rules:\n  - alert: Lost\n    expr: rate(ray_tandem_jobz_total[5m]) > 0\n"
    chart = planted(tmp_path, "files/rules/tandem.yaml", "groups:\n", lost)
    (told,) = unknown_metrics(render(values, chart=chart))
    assert "there is no metric ray_tandem_jobz_total" in told


def test_a_variable_before_what_it_is_made_of(tmp_path: Path) -> None:
    values = example("minimal-cpu")
    assert LINKS["variables"](render(values)) == []
    chart = planted(tmp_path, "templates/_helpers.tpl", "- name: OWN_REDIS_PASSWORD", "- name: OTHER_PASSWORD")
    told = LINKS["variables"](render(values, chart=chart))
    assert any("uses OWN_REDIS_PASSWORD, which is not set before it" in each for each in told)


def test_service_links_that_the_server_takes_for_settings(tmp_path: Path) -> None:
    head = "    automountServiceAccountToken: true\n    enableServiceLinks: "
    chart = planted(tmp_path, "templates/_ray.tpl", f"{head}false", f"{head}true")
    told = LINKS["variables"](render(example("minimal-cpu"), chart=chart))
    assert any("head: service links" in each for each in told)


def test_a_secret_in_the_open(tmp_path: Path) -> None:
    values = over(example("minimal-cpu"), {"redis": {"jobs": {"url": "rediss://:hidden-away@redis.example.com/0"}}})
    assert RULES["secrecy"](render(values)) == []
    chart = planted(
        tmp_path,
        "templates/_ray.tpl",
        "\n- name: RAY_USAGE_STATS_ENABLED",
        "\n- name: ELSEWHERE\n  value: {{ .context.Values.redis.jobs.url }}\n- name: RAY_USAGE_STATS_ENABLED",
    )
    told = RULES["secrecy"](render(values, chart=chart))
    assert any("tells Secret/" in each for each in told)


def test_each_planted_chart_is_one_of_its_own(tmp_path: Path) -> None:
    """The copy is whole: without a fault it renders what the chart does."""
    copied = planted(tmp_path, "Chart.yaml", "apiVersion: v2", "apiVersion:  v2")
    values = over(example("heterogeneous"), GIVEN)
    assert render(values, chart=copied).manifests == render(values).manifests
    shutil.rmtree(copied)
