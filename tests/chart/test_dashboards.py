"""Grafana's dashboards: every metric exists, every panel is whole, and nothing lies over anything else."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.chart import CHART, ROOT, planted, render
from support.promql import LEGEND, OURS, complaints, grouped, promql, promtool, selectors, without_grafana

FILES = sorted((CHART / "files" / "dashboards").glob("*.json"))
BOARDS = {file.stem: json.loads(file.read_text()) for file in FILES}
VALUES: dict[str, Any] = {
    "image": {"registry": "registry.example.com"},
    "s3": {"bucket": "images"},
    "monitoring": {"dashboards": {"enabled": True, "annotations": {"grafana_folder": "Tandem"}}},
}
UNITS = {"short", "none", "s", "ms", "bytes", "percentunit", "reqps", "cps", "suffix: /min"}
"""Of Grafana's, those that are used here: a misspelt one is no unit."""
WANTED = {
    "overview": {
        "ray_tandem_jobs_total",
        "ray_tandem_encode_seconds_bucket",
        "ray_tandem_prompts_total",
        "ray_serve_application_status",
        "ray_tandem_replicas_wanted",
        "ALERTS",
    },
    "encoder-pool": {
        "ray_tandem_encode_seconds_bucket",
        "ray_tandem_text_units_total",
        "ray_tandem_truncated_prompts_total",
        "ray_tandem_prompt_tokens_total",
        "ray_tandem_embedding_similarity_bucket",
        "ray_tandem_device_memory_bytes",
        "ray_tandem_device_utilization_ratio",
        "ray_tandem_encoder_forward_rows_total",
    },
    "fleet": {
        "ray_tandem_replicas",
        "ray_tandem_device_memory_bytes",
        "ray_tandem_device_utilization_ratio",
        "ray_tandem_engine_image_steps_total",
        "ray_tandem_engine_out_of_memory_total",
    },
    "jobs": {"ray_tandem_queue_age_seconds", "ray_tandem_backlog_seconds", "ray_tandem_unfinished_jobs"},
}
"""What each is there for."""


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def targets() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{name}: {panel['title']}", target)
        for name, board in BOARDS.items()
        for panel in panels(board)
        for target in panel["targets"]
    ]


def queries(board: dict[str, Any]) -> list[str]:
    """Of its variables: label_values(SELECTOR, LABEL)."""
    return [each["query"]["query"] for each in board["templating"]["list"] if each["type"] == "query"]


def test_every_expression_asks_for_what_there_is() -> None:
    assert [(where, wrong) for where, target in targets() for wrong in complaints(target["expr"], {})] == []


def test_every_variable_asks_for_what_there_is() -> None:
    for query in itertools.chain.from_iterable(map(queries, BOARDS.values())):
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
        assert found is not None, query
        assert complaints(f"max by ({found[2]}) ({found[1]})", {}) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("ray_tandem_queue_age_seconds", "ray_tandem_queue_age", "no metric ray_tandem_queue_age"),
        ('tier=\\"encoded\\"', 'tier=\\"computed\\"', "never has tier='computed'"),
        ("by (encoder)", "by (coder)", "grouped by coder"),
        ("(rate(", "(rate((", "unclosed left parenthesis"),
    ],
)
def test_an_expression_that_asks_for_what_there_is_not(old: str, new: str, told: str) -> None:
    texts = [file.read_text() for file in FILES]
    assert any(old in text for text in texts), "the fault is planted in vain"
    wrong = [
        complaint
        for text in texts
        for panel in panels(json.loads(text.replace(old, new)))
        for target in panel["targets"]
        for complaint in complaints(target["expr"], {})
    ]
    assert wrong
    assert all(told in each for each in wrong)


def test_each_shows_what_it_is_there_for() -> None:
    assert BOARDS.keys() == WANTED.keys()
    for name, board in BOARDS.items():
        asked = {
            selector.name
            for panel in panels(board)
            for target in panel["targets"]
            for selector in asked_by(target["expr"])
        }
        assert WANTED[name] <= asked


def test_every_metric_of_ours_is_on_some_dashboard() -> None:
    """But for those that tell the same as another one."""
    asked = {selector.name for _, target in targets() for selector in asked_by(target["expr"])}
    told = {name for name in OURS if name in asked or name.replace("_count", "_bucket") in asked}
    missing = {name for name in OURS.keys() - told if not name.endswith("_count")}
    assert missing == {
        "ray_tandem_queue_depth",  # the sum of what waits by model
        "ray_tandem_encoder_batch_rows_bucket",  # the mean is on the pool's dashboard
        "ray_tandem_engine_step_rows_bucket",  # the mean is on the fleet's dashboard
    }


def asked_by(expression: str) -> list[Any]:
    return selectors(promql.parse(without_grafana(expression)))


def test_every_selector_is_of_the_chosen_releases() -> None:
    for where, target in targets():
        for selector in asked_by(target["expr"]):
            chosen = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
            assert chosen["namespace"] == "$namespace", where
            if selector.name.startswith("kubelet_"):  # which knows no release: by the name of the claim
                assert chosen["persistentvolumeclaim"].startswith("data-$release"), where
            else:
                assert chosen["release"] == "$release", where


def test_every_variable_is_of_the_chosen_releases() -> None:
    for query in (each for board in BOARDS.values() for each in queries(board)):
        label = re.findall(r"(\w+)\)$", query)[0]
        wanted = {"namespace": [], "release": ["namespace"]}.get(label, ["namespace", "release"])
        assert re.findall(r'(\w+)=~"\$\1"', query) == wanted


def test_a_node_without_a_gpu_class_is_called_so() -> None:
    """An empty label would leave the legend with a name that ends in nothing."""
    named = [target for _, target in targets() if "gpu_class" in LEGEND.findall(target["legendFormat"])]
    assert named
    for target in named:
        assert target["expr"].startswith("label_replace(")
        assert target["expr"].endswith(', "gpu_class", "no class", "gpu_class", "")')


def test_thresholds_that_do_not_follow_the_rules_values_say_so() -> None:
    for panel in itertools.chain.from_iterable(map(panels, BOARDS.values())):
        coloured = len(panel["fieldConfig"]["defaults"]["thresholds"]["steps"]) > 1
        assert ("default thresholds" in panel["description"]) == coloured


def test_a_single_number_is_never_a_not_a_number() -> None:
    """Over a few minutes a quiet server has no job and no text: 0/0 is no number, and what there is none of says so."""
    single = [panel for board in BOARDS.values() for panel in panels(board) if panel["type"] == "stat"]
    assert single
    for panel in single:
        for expression in (target["expr"] for target in panel["targets"]):
            assert "$__rate_interval" not in expression, "of a rare event it has none"
            if " / " in expression or "histogram_quantile" in expression:
                assert panel["fieldConfig"]["defaults"]["noValue"]
                assert re.search(r" / \(.* > 0\)$|>= 0$", expression)


def test_a_counter_of_two_releases_is_summed_up_by_release_before() -> None:
    """`max` over all would take two releases for one, as if both told the same replicas or jobs."""
    counted = re.compile(r"max(?: by \(([^)]*)\))? \(ray_tandem_(?:replicas|replicas_wanted|unfinished_jobs)\{")
    found = [labels for _, target in targets() for labels in counted.findall(target["expr"])]
    assert found
    assert all({"namespace", "release"} <= set(re.findall(r"\w+", labels)) for labels in found)


def test_what_every_ingress_replica_tells_alike_is_never_summed_up_first() -> None:
    alike = re.compile(r"(\w+)(?: by \([^)]*\))? \(ray_tandem_(?:queue|unfinished|backlog|replicas)\w*\{")
    found = [(where, function) for where, target in targets() for function in alike.findall(target["expr"])]
    assert found
    assert {function for _, function in found} == {"max"}


def test_legends_name_labels_that_are_there() -> None:
    for where, target in targets():
        tree = promql.parse(without_grafana(target["expr"]))
        assert set(LEGEND.findall(target["legendFormat"])) <= grouped(tree), where


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_is_whole(name: str) -> None:
    board = BOARDS[name]
    assert board["uid"] == f"tandem-{name}"
    assert board["title"].startswith("Tandem / ")
    assert board["description"]
    assert board["schemaVersion"] >= 38  # Grafana 10
    assert "id" not in board  # of an installation
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert list(variables)[:3] == ["datasource", "namespace", "release"]
    assert variables["datasource"]["type"] == "datasource"
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"]))) - {"__rate_interval"}
    assert used == variables.keys(), "every variable is used, and every used one is there"
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    for panel in panels(board):
        assert panel["title"]
        assert panel["description"].endswith((".", "?"))
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["datasource"]["uid"] == "${datasource}"
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEFGH"[: len(panel["targets"])])
        assert len({target["legendFormat"] for target in panel["targets"]}) == len(panel["targets"])


@pytest.mark.parametrize("name", BOARDS)
def test_panels_fill_their_rows_and_lie_beside_each_other(name: str) -> None:
    places = [panel["gridPos"] for panel in BOARDS[name]["panels"]]
    taken = [
        {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])} for at in places
    ]
    for one, other in itertools.combinations(taken, 2):
        assert not one & other
    everything = set().union(*taken)
    assert {x for x, _ in everything} == set(range(24))
    bottom = max(y for _, y in everything)
    assert everything == {(x, y) for x in range(24) for y in range(bottom + 1)}, "no holes"


def test_they_are_what_the_script_writes() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "monitoring.py", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_the_chart_carries_them_as_they_are() -> None:
    configs = [each for each in render(VALUES).of("ConfigMap") if "grafana_dashboard" in each["metadata"]["labels"]]
    assert [each["metadata"]["name"] for each in configs] == [f"tandem-dashboard-{file.stem}" for file in FILES]
    for config, file in zip(configs, FILES, strict=True):
        assert config["metadata"]["annotations"]["grafana_folder"] == "Tandem"
        ((name, text),) = config["data"].items()
        assert name == f"tandem-{file.name}"
        assert json.loads(text) == json.loads(file.read_text())
        assert len(text) < 900_000  # of the MiB that a ConfigMap holds


def test_a_dashboard_that_is_added_is_carried_too(tmp_path: Path) -> None:
    chart = planted(tmp_path, "files/dashboards/jobs.json", '"uid": "tandem-jobs"', '"uid": "mine"')
    (chart / "files" / "dashboards" / "mine.json").write_text('{"uid": "{{ no template }}"}')
    found = {each["metadata"]["name"]: each["data"] for each in render(VALUES, chart=chart).of("ConfigMap")}
    assert found["tandem-dashboard-mine"] == {"tandem-mine.json": '{"uid": "{{ no template }}"}'}
    assert '"uid": "mine"' in found["tandem-dashboard-jobs"]["tandem-jobs.json"]


def test_prometheus_takes_every_expression(tmp_path: Path) -> None:
    rules = [
        {"record": f"dashboard:panel:{number}", "expr": without_grafana(target["expr"])}
        for number, (_, target) in enumerate(targets())
    ]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    done = subprocess.run([promtool(), "check", "rules", tmp_path / "all.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout
