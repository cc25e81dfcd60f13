"""Recordings and alerts: every metric exists, every alert is explained, and fires when it should, not just before."""

import argparse
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from support.chart import CHART, ROOT, Refused, at, over, planted, put, render, values_of
from support.promql import complaints, promql, promtool, recorded, selectors

from serve.settings.stores import JobSettings

TESTS = sorted((Path(__file__).parent / "rules").glob("*.test.yaml"))
PAGE = ROOT / "docs" / "monitoring.md"
VALUES: dict[str, Any] = {
    "image": {"registry": "registry.example.com"},
    "s3": {"bucket": "images"},
    "monitoring": {"rules": {"enabled": True}},
}
THRESHOLDS = {
    "encodeP99Seconds": 0.75,
    "cacheHitRatio": 0.25,
    "queueAgeSeconds": 77,
    "backlogSeconds": 1234567,
    "failedRatio": 0.0125,
    "serverErrorRatio": 0.0375,
}


def groups(values: dict[str, Any] = VALUES, chart: Path = CHART) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = render(values, chart=chart).one("PrometheusRule")["spec"]["groups"]
    return found


def rules(values: dict[str, Any] = VALUES, chart: Path = CHART) -> list[dict[str, Any]]:
    return [rule for group in groups(values, chart) for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def test_every_expression_asks_for_what_there_is() -> None:
    records = recorded(groups())
    assert [(rule["expr"], wrong) for rule in rules() for wrong in complaints(rule["expr"], records)] == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("absent(ray_tandem_queue_depth{", "absent(ray_tandem_queue_depths{", "no metric ray_tandem_queue_depths"),
        (
            'status_terminated_reason{$(podScope), reason="OOM',
            'status_terminated_reason{$(podScope), reason="Oom',
            "OomKilled",
        ),
        ("(ray_tandem_backlog_seconds{", "(tandem_backlog_seconds{", "no metric tandem_backlog_seconds"),
        (", sign!=", ", side!=", "ray_tandem_text_units_total has no label side"),
        (
            "release, placement, gpu_class) (\n          (",
            "release, placement, card) (\n          (",
            "grouped by card",
        ),
        ("p99_10m{$(scope)} >", "p99_5m{$(scope)} >", "no metric tandem:encode_seconds:p99_5m"),
        ("increase(ray_tandem_encode_seconds_count{", "increase(ray_tandem_encode_seconds_sum{", "encode_seconds_sum"),
    ],
)
def test_an_expression_that_asks_for_what_there_is_not(tmp_path: Path, old: str, new: str, told: str) -> None:
    file = CHART / "files" / "rules" / "tandem.yaml"
    assert old in file.read_text(), "the fault is planted in vain"
    chart = planted(tmp_path, "files/rules/tandem.yaml", old, new)
    found = [wrong for rule in rules(chart=chart) for wrong in complaints(rule["expr"], recorded(groups(chart=chart)))]
    assert found
    assert all(told in wrong for wrong in found)


def test_every_selector_is_of_this_release() -> None:
    """Two releases on one Prometheus: neither's alerts speak of the other. And each says whose it is."""
    spec = render(VALUES | {"nameOverride": "pictures"}, name="one", namespace="here").one("PrometheusRule")["spec"]
    for rule in (rule for group in spec["groups"] for rule in group["rules"]):
        found = selectors(promql.parse(rule["expr"]))
        assert found
        ours = [{each.name: each.value for each in selector.matchers.matchers} for selector in found]
        assert all(each["namespace"] == "here" for each in ours), rule["expr"]
        if all(each.get("release") == "one" for each in ours):
            continue
        for each in ours:
            (told,) = [each[label] for label in ("name", "pod", "persistentvolumeclaim") if label in each]
            assert told.removeprefix("data-").startswith("one-pictures-") or told == "one-pictures"
        assert rule["labels"]["release"] == "one", "whose it is does not follow from the expression"


CHANCE = "bcdfghjklmnpqrstvwxz2456789"
"""Of names that Kubernetes and KubeRay draw: k8s.io/apimachinery/pkg/util/rand."""
EXTERNAL = values_of(CHART / "ci" / "external-services-values.yaml")
"""Without Redis servers of ours the release may have a longer name."""


@pytest.mark.parametrize("fullname", ["tandem", "a" * 44, "tandem-" + "b" * 39, "c" * 47])
def test_an_alert_knows_its_own_pods_from_those_of_a_release_whose_name_begins_alike(fullname: str) -> None:
    def pods(name: str) -> list[str]:
        """As KubeRay and Kubernetes name them: controllers/ray/utils/util.go, PodName and GenerateRayClusterName."""
        cluster = f"{name}-{CHANCE[5:10]}"
        rays = [cluster[:50] + "-head", *(f"{cluster}-{group}"[:50] + "-worker" for group in ("cpu", "gpu-4gb"))]
        return [
            *(f"{each}-{CHANCE[-5:]}" for each in rays),
            f"{cluster[:50]}-head",
            *(f"{name}-redis-{which}" for which in ("jobs-0", "gcs-0", f"cache-{CHANCE[:9]}-{CHANCE[9:14]}")),
        ]

    values = over(EXTERNAL, {"fullnameOverride": fullname, "monitoring": {"rules": {"enabled": True}}})
    expressions = [rule["expr"] for rule in rules(values) if "alert" in rule]
    patterns = {found for each in expressions for found in re.findall(r'pod=~"(.*?)"', each)}
    assert patterns
    for pattern in patterns:
        assert all(re.fullmatch(pattern, pod) for pod in pods(fullname))
        if len(fullname) <= 30:
            others = [f"{fullname}{rest}" for rest in ("-staging", "-stage", "-stg", "-v2", "2", "-prod-eu")]
            assert not [pod for other in others for pod in pods(other) if re.fullmatch(pattern, pod)]
        assert not re.fullmatch(pattern, f"{fullname}-preload-{CHANCE[:5]}")
        assert not re.fullmatch(pattern, f"other-{pods(fullname)[0]}")


def test_every_alert_says_what_to_do_and_where_to_read_on() -> None:
    page = PAGE.read_text()
    headings = {line.removeprefix("### ") for line in page.splitlines() if line.startswith("### ")}
    assert headings == alerts().keys(), "one section for each alert, and none for others"
    for name, alert in alerts().items():
        assert alert["labels"].keys() - {"release"} == {"severity"}
        assert alert["labels"]["severity"] in ("warning", "critical")
        section = page.partition(f"### {name}\n")[2].partition("\n### ")[0]
        assert section.strip().startswith(f"*{alert['labels']['severity'].capitalize()}.")
        assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert alert["annotations"]["runbook_url"].endswith(f"docs/monitoring.md#{name.lower()}")
        assert len(alert["annotations"]["description"]) > 80


def test_a_template_names_labels_that_its_alert_has() -> None:
    """A label that is not there is an empty word in the message."""
    for name, alert in alerts().items():
        kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \((.*?)\)", alert["expr"]))))
        for record, labels in recorded(groups()).items():
            kept |= labels if record in alert["expr"] else set()
        if alert["expr"].startswith(("kube", "absent")):
            kept |= {"namespace", "name", "pod", "container", "release", "persistentvolumeclaim"}
        used = set(re.findall(r"\$labels\.(\w+)", " ".join(alert["annotations"].values())))
        assert used <= kept, name


def test_the_thresholds_are_the_values() -> None:
    values = VALUES | {"monitoring": {"rules": {"enabled": True, **THRESHOLDS}}}
    before, after = ["\n".join(rule["expr"] for rule in rules(given)) for given in (VALUES, values)]
    for threshold in THRESHOLDS.values():
        assert float(threshold) not in _numbers(before)
        assert float(threshold) in _numbers(after)
    assert "$(" not in yaml.safe_dump(groups(values))


def _numbers(text: str) -> set[float]:
    return {float(found) for found in re.findall(r"[<>] ([\d.]+(?:e[+-]?\d+)?)", text)}


def test_how_long_a_model_may_be_without_replica_is_a_value() -> None:
    """And by default there is time to tell before what waits has expired."""
    values = VALUES | {"monitoring": {"rules": {"enabled": True, "noReplicaFor": "42m"}}}
    found = {rule["alert"]: rule for rule in rules(values) if "alert" in rule}["TandemNoReplica"]
    assert found["for"] == "42m"
    assert found["annotations"]["description"].startswith("For 42m no")
    assert int(alerts()["TandemNoReplica"]["for"].removesuffix("m")) * 60 <= JobSettings().queue_ttl_s / 2


def test_where_the_runbook_lies_is_a_value() -> None:
    url = "https://wiki.example.com/tandem"
    values = VALUES | {"monitoring": {"rules": {"enabled": True, "runbookUrl": url}}}
    told = [rule["annotations"]["runbook_url"] for rule in rules(values) if "alert" in rule]
    assert told
    assert all(each.startswith(f"{url}#") for each in told)


def test_without_the_operator_the_rules_are_a_file_as_the_page_says(tmp_path: Path) -> None:
    (command,) = re.findall(r"helm template [^`]*?prometheusrule\.yaml", PAGE.read_text())
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs=4)  # helm template NAME CHART
    for option in ("-n", "-f", "--set", "--show-only"):
        parser.add_argument(option, required=True, dest=option.strip("-"))
    given = vars(parser.parse_args(shlex.split(command)))
    assert given["words"][3] == str(CHART.relative_to(ROOT))
    path, _, value = given["set"].partition("=")
    mine = {name: value for name, value in VALUES.items() if name != "monitoring"}  # values.yaml as most have it
    loaded = helm_python.Chart.load(CHART)
    values = put(mine, tuple(path.split(".")), yaml.safe_load(value))
    loaded.validate_schema(values)
    files = loaded.render(values, name=given["words"][2].lower(), namespace=given["n"].lower())
    (text,) = [text for name, text in files.items() if name.endswith(given["show-only"])]
    spec = yaml.safe_load(text)["spec"]
    assert 'namespace="namespace", release="name"' in spec["groups"][0]["rules"][0]["expr"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    promtool_says("check", "rules", "rules.yaml", cwd=tmp_path)


def test_nothing_of_the_operators_is_there_unless_asked_for() -> None:
    quiet = render({name: value for name, value in VALUES.items() if name != "monitoring"})
    assert not [each["kind"] for each in quiet.manifests if each["kind"] in ("PrometheusRule", "PodMonitor")]
    assert "tandem-dashboard-overview" not in {each["metadata"]["name"] for each in quiet.of("ConfigMap")}


def test_the_pod_monitor_finds_rays_pods_and_labels_what_they_say() -> None:
    values = VALUES | {"monitoring": {"podMonitor": {"enabled": True, "labels": {"release": "prometheus"}}}}
    rendered = render(values)
    monitor = rendered.one("PodMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    cluster = rendered.cluster
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        ports = at(group, ("template", "spec", "containers", 0, "ports"))
        assert {"name": "metrics", "containerPort": 8080} in [
            {key: port[key] for key in ("name", "containerPort")} for port in ports if port["name"] == endpoint["port"]
        ]
        labels = group["template"]["metadata"]["labels"] | {"ray.io/is-ray-node": "yes"}  # which KubeRay adds
        assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert {each["targetLabel"] for each in endpoint["relabelings"]} == {"release", "ray_cluster", "ray_group"}


def test_a_rules_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    chart = planted(tmp_path, "files/rules/tandem.yaml", "groups:\n", "groups: [\n")
    with pytest.raises(Refused, match=r"files/rules/tandem\.yaml"):
        rules(chart=chart)


# What Prometheus itself says


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The rendered rules, and the tests of them beside."""
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups()}, sort_keys=False))
    for file in TESTS:
        shutil.copy(file, tmp_path)
    return tmp_path


def promtool_says(*arguments: str, cwd: Path) -> None:
    done = subprocess.run([promtool(), *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_rules(folder: Path) -> None:
    promtool_says("check", "rules", "rules.yaml", cwd=folder)


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name.removesuffix(".test.yaml"))
def test_alerts_fire_when_they_should_and_not_just_before(folder: Path, file: Path) -> None:
    promtool_says("test", "rules", file.name, cwd=folder)


def test_every_alert_is_tried_both_ways() -> None:
    """In a test that bears its name: once it fires, and once nothing does."""
    tried: dict[str, set[bool]] = {}
    for test in (test for file in TESTS for test in yaml.safe_load(file.read_text())["tests"]):
        name = test["name"].partition(":")[0]
        for case in test.get("promql_expr_test", []):
            fired = {re.findall(r'alertname="(\w+)"', sample["labels"])[0] for sample in case["exp_samples"]}
            assert fired <= {name}, test["name"]
            tried.setdefault(name, set()).add(bool(fired))
    assert tried == {name: {True, False} for name in alerts()}
