"""What makes KubeRay build a second cluster, and what must not: a second cluster needs twice the GPUs while it starts.

golden/clusters.json holds, for each example, the hash by which the operator decides. A change of it says that this
version of the chart, installed over the last one, starts a second cluster at every installation. Where that is meant,
CHART_NEW_CLUSTERS='why' pytest tests/chart/test_upgrade.py writes the hashes, and the reason goes into the change log.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.chart import CI, ROOT, over, planted, render, values_of
from support.chart_kuberay import hashed

GOLDEN = ROOT / "tests" / "chart" / "golden" / "clusters.json"
SWITCH = "CHART_NEW_CLUSTERS"
EXAMPLE = "heterogeneous"


def values(name: str = EXAMPLE) -> dict[str, Any]:
    """An example's values, with an image that a release of Tandem does not change."""
    (file,) = [each for each in CI if each.name == f"{name}-values.yaml"]
    return over(values_of(file), {"image": {"tag": "golden"}})


def cluster(given: dict[str, Any], chart: Path | None = None) -> str:
    return hashed((render(given) if chart is None else render(given, chart=chart)).cluster)


def test_no_installation_gets_a_second_cluster_unawares() -> None:
    now = {file.name: cluster(values(file.name.removesuffix("-values.yaml"))) for file in CI}
    known = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {"clusters": {}}
    reason = os.environ.get(SWITCH)
    if reason:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps({"last change": reason, "clusters": now}, indent=2) + "\n", encoding="utf-8")
        known = {"clusters": now}
    changed = [name for name in now if known["clusters"].get(name) != now[name]]
    assert not changed, (
        f"{', '.join(changed)}: an upgrade to this chart starts a second Ray cluster beside the one that serves, with "
        f"as many GPUs. If that is meant: {SWITCH}='why' pytest {Path(__file__).relative_to(ROOT)}; and say so in "
        "CHANGELOG.md"
    )
    assert known["clusters"].keys() == now.keys()


FREE: dict[str, dict[str, Any]] = {
    "a setting": {"config": {"jobs": {"max_queued": 7}}},
    "a placement's replicas": {"config": {"diffusion": {"replicas": 2}}},
    "an alert's threshold": {"monitoring": {"rules": {"enabled": True, "queueAgeSeconds": 7}}},
    "monitoring": {"monitoring": {"podMonitor": {"enabled": True}, "dashboards": {"enabled": True}}},
    "labels of everything": {"commonLabels": {"team": "a"}, "commonAnnotations": {"note": "b"}},
    "a timeout of Serve": {"serve": {"keepAliveTimeoutSeconds": 7}},
    "the address": {"ingress": {"enabled": True, "hosts": ["images.example.com"]}},
    "the service": {"service": {"type": "LoadBalancer", "port": 80}},
    "Redis' size": {"redis": {"jobs": {"memory": "3Gi"}, "cache": {"memory": "3Gi"}}},
    "the network": {"networkPolicy": {"enabled": False}},
    "budgets": {"podDisruptionBudget": {"enabled": False}},
    "tests": {"tests": {"enabled": False}},
    "pre-pull": {"prePull": {"enabled": True}},
    "how long the old cluster stays": {"ray": {"upgrade": {"deletionDelaySeconds": 777}}},
}


@pytest.mark.parametrize("change", FREE.values(), ids=FREE)
def test_a_running_cluster_outlives(change: dict[str, Any]) -> None:
    before, after = values(), over(values(), change)
    assert render(before).manifests != render(after).manifests
    assert cluster(before) == cluster(after)


def test_a_running_cluster_outlives_other_bounds_of_its_groups_and_other_tolerations() -> None:
    before = values()
    groups = render(before).values["workerGroups"]
    tolerations = [{"key": "spot", "operator": "Exists"}]
    changed = [{**group, "max": group["max"] + 3, "tolerations": tolerations} for group in groups]
    after = over(before, {"workerGroups": changed})
    assert render(after).cluster != render(before).cluster
    assert cluster(after) == cluster(before)


def test_a_running_cluster_outlives_another_version_of_the_chart(tmp_path: Path) -> None:
    version = render(values()).service["metadata"]["labels"]["helm.sh/chart"].removeprefix("tandem-")
    chart = planted(tmp_path, "Chart.yaml", f"\nversion: {version}", "\nversion: 77.7.7")
    assert "77.7.7" in str(render(values(), chart=chart).manifests)
    assert cluster(values(), chart) == cluster(values())


def test_a_group_at_the_end_leaves_those_before_it_as_they_are() -> None:
    """KubeRay takes such a cluster over as it is, and lets the new group start beside the others."""
    before = render(values())
    groups = copy.deepcopy(before.values["workerGroups"])
    more = render(over(values(), {"workerGroups": [*groups, {**groups[-1], "name": "one-more"}]}))
    had, has = before.cluster["workerGroupSpecs"], more.cluster["workerGroupSpecs"]
    assert [each["groupName"] for each in has[len(had) :]] == ["one-more"]
    cut = {**more.cluster, "workerGroupSpecs": has[: len(had)]}
    assert hashed(cut) == hashed(before.cluster)
    assert hashed(more.cluster) != hashed(before.cluster)


def test_another_image_or_variable_is_a_second_cluster() -> None:
    """So that the hash is not one that nothing changes."""
    for change in ({"image": {"tag": "next"}}, {"extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}]}):
        assert cluster(over(values(), change)) != cluster(values())
