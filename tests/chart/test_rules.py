"""Recordings and alerts: every metric exists, every alert is explained, and fires when it should, not just before."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.chart import CHART, ROOT, Refused, at, planted, render
from support.promql import complaints, promtool, recorded

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
    """Two releases on one Prometheus: neither's alerts speak of the other."""
    values = VALUES | {"nameOverride": "pictures"}
    spec = render(values, name="one", namespace="here").one("PrometheusRule")["spec"]
    for rule in (rule for group in spec["groups"] for rule in group["rules"]):
        for selector in re.findall(r"([a-z][\w:]*)\{(.*?)\}", rule["expr"]):
            name, matchers = selector
            assert 'namespace="here"' in matchers, name
            assert (
                ('release="one"' in matchers) or ('="one-pictures' in matchers) or ('=~"one-pictures-.*"' in matchers)
            )
        assert len(re.findall(r"\{", rule["expr"])) == len(
            re.findall(r"\b(?:ray|tandem|kube|kuberay)[_:]\w", rule["expr"])
        )


def test_every_alert_says_what_to_do_and_where_to_read_on() -> None:
    page = PAGE.read_text()
    headings = {line.removeprefix("### ") for line in page.splitlines() if line.startswith("### ")}
    assert headings == alerts().keys(), "one section for each alert, and none for others"
    for name, alert in alerts().items():
        assert alert["labels"] == {"severity": alert["labels"]["severity"]}
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
            kept |= {"namespace", "name", "pod", "container", "release"}
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


def test_where_the_runbook_lies_is_a_value() -> None:
    url = "https://wiki.example.com/tandem"
    values = VALUES | {"monitoring": {"rules": {"enabled": True, "runbookUrl": url}}}
    told = [rule["annotations"]["runbook_url"] for rule in rules(values) if "alert" in rule]
    assert told
    assert all(each.startswith(f"{url}#") for each in told)


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
