"""Values: what may be left out, what is refused and with which words, and that each does what it says, a 0 too."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.chart import (
    CI,
    CI_BAD,
    Place,
    Refused,
    at,
    dotted,
    leaves,
    over,
    put,
    render,
    rendered_anew,
    tells,
    values_of,
    where,
)
from support.chart_links import LINKS
from support.chart_rules import RULES
from support.chart_schemas import schema_faults
from support.chart_values import DEFAULTS, EVERY, GIVEN, NEEDED, TABLES, lost_zeros, numbers, values_with


def groups(node: Any = EVERY, path: Place = ()) -> Iterator[Place]:
    """Every group of values.yaml whose names are ours."""
    if isinstance(node, Mapping):
        if not path or path[-1] not in TABLES:
            yield path
        for name, value in node.items():
            if not path or path[-1] not in TABLES - {"gpu_classes"}:
                yield from groups(value, (*path, name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from groups(value, (*path, index))


def every_value(node: Any = DEFAULTS, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    for name, value in node.items():
        yield (*path, name), value
        if isinstance(value, Mapping) and name != "config":
            yield from every_value(value, (*path, name))


def test_a_registry_and_a_bucket_are_all_that_is_needed() -> None:
    render(NEEDED)
    render({"image": NEEDED["image"], "s3": {"trial": {"enabled": True}}})
    for name, path in (("image", "image.registry"), ("s3", "s3.bucket")):
        with pytest.raises(Refused, match=re.escape(path)):
            render({other: value for other, value in NEEDED.items() if other != name})


@pytest.mark.parametrize("file", CI_BAD, ids=lambda file: file.stem)
def test_a_bad_value_is_refused_by_its_path_and_the_way_out(file: Path) -> None:
    first, *_ = file.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# expect: "), f"{file.name} must begin with `# expect: ` and a part of the message"
    with pytest.raises(Refused) as refused:
        render(file)
    told = str(refused.value)
    assert first.removeprefix("# expect: ") in told
    paths = re.findall(r"values: ([A-Za-z][\w.\[\]-]*)", told)
    paths += [path.replace("/", ".") for path in re.findall(r"at '/([^']*)'", told)]
    named = [path for path in paths if re.split(r"[.\[]", path)[0] in DEFAULTS]
    assert named or "at '': additional properties" in told, f"no value is named: {told}"


@pytest.mark.parametrize("path", groups(), ids=dotted)
def test_an_unknown_name_is_refused_at_every_level(path: Place) -> None:
    with pytest.raises(Refused) as refused:
        render(values_with((*path, "registryy"), "x"))
    told = str(refused.value)
    assert "registryy" in told
    assert tells(told, path)


@pytest.mark.parametrize(
    "path",
    [path for path, value in leaves(EVERY) if isinstance(value, (bool, int, float)) and not TABLES & {*path}],
    ids=dotted,
)
def test_a_string_is_no_number_and_no_switch(path: Place) -> None:
    with pytest.raises(Refused) as refused:
        render(values_with(path, "yes"))
    assert tells(str(refused.value), path)


@pytest.mark.parametrize("path", numbers(), ids=dotted)
def test_a_zero_stays_a_zero_or_is_refused(path: Place) -> None:
    """Each place that follows the value follows it down to 0, where a template's `default` would put something else."""
    told = refusal(values_with(path, 0))
    if told:
        assert tells(told, path[:-1])
    else:
        assert lost_zeros(path) == []


def refusal(values: Mapping[str, Any]) -> str:
    """Helm's message; empty where it renders."""
    try:
        render(values)
    except Refused as refused:
        return str(refused)
    return ""


def test_settings_go_through_as_they_are() -> None:
    config = {
        "model": {"source": "shapes", "num_inference_steps": 4},
        "encoder": {"min_replicas": 0, "num_cpus": 0, "redis": False},
        "cache": {"memory_bytes": 0},
        "diffusion": {"profile_s": 0, "replicas": 0, "step_cache": False, "drain_s": 1.5},
        "jobs": {"retry_backoff_s": 0, "max_queued_s": 1000000},
        "results": {"spool_bytes": 0},
    }
    told = render({**NEEDED, "config": config}).args
    for path, value in leaves(config):
        assert at(told, path) == value
        assert type(at(told, path)) is type(value) or isinstance(value, float), f"{path}: {at(told, path)!r}"


def test_nothing_is_drawn_by_chance_where_secrets_are_given() -> None:
    given = {name: GIVEN[name] for name in ("keys", "redis")}
    for file in CI:
        values = over(given, values_of(file))
        assert rendered_anew(values).manifests == rendered_anew(values).manifests, file.name


def test_chance_makes_nothing_but_secrets() -> None:
    one, two = rendered_anew(NEEDED), rendered_anew(NEEDED)
    differ = [a for a, b in zip(one.manifests, two.manifests, strict=True) if a != b]
    assert differ
    assert {each["kind"] for each in differ} == {"Secret"}


def test_common_labels_lie_on_everything_but_rays_pods() -> None:
    rendered = render(over(NEEDED, {"commonLabels": {"team": "pictures"}, "commonAnnotations": {"note": "ours"}}))
    for manifest in rendered.manifests:
        assert manifest["metadata"]["labels"]["team"] == "pictures", where(manifest)
        assert manifest["metadata"]["annotations"]["note"] == "ours", where(manifest)
    assert "pictures" not in str(rendered.cluster)


GPU = {"name": "gpu", "gpuClass": "11gb", "gpus": 1, "cpu": "2", "memory": "16Gi", "min": 0, "max": 2}
CPU = {"name": "cpu", "cpu": "4", "memory": "8Gi", "min": 1, "max": 4}
BOUNDS = {"gt": 10000, "lt": 12500}
ODD: dict[str, dict[str, Any]] = {
    "a pod in bytes": {"workerGroups": [{**CPU, "memory": "8589934592", "shm": "209715200"}]},
    "a pod by an exponent": {"workerGroups": [{**CPU, "memory": "8e9"}]},
    "a pod in thousandths of a CPU": {"workerGroups": [{**CPU, "cpu": "3500m", "memory": "0.5Ti"}]},
    "no limit of scratch": {"scratch": {"sizeLimit": "0"}},
    "cards of any memory": {"workerGroups": [CPU, {**GPU, "gpuMemoryMiB": {"gt": 0}}]},
    "cards with a lower bound alone": {"workerGroups": [CPU, {**GPU, "gpuMemoryMiB": {"gt": 10000}}]},
    "cards by a label alone": {"workerGroups": [CPU, {**GPU, "gpuMemoryMiB": None, "nodeSelector": {"pool": "a"}}]},
    "a class of half a gigabyte": {"config": {"gpu_classes": {"tiny": {"memory_gb": 0.5}}}},
    "the largest cards": {
        "config": {"gpu_classes": {"big": {"memory_gb": 288}}},
        "workerGroups": [CPU, {**GPU, "gpuClass": "big", "gpuMemoryMiB": {"gt": 270000, "lt": 300000}}],
    },
    "a registry with a port and two folders": {"image": {"registry": "registry.example.com:5000/a/b/"}},
    "a tag that begins with cpu": {"image": {"tag": "cpu-0.1.0"}},
    "an access point for a bucket": {"s3": {"bucket": "arn:aws:s3:eu-central-1:123456789012:accesspoint/pictures"}},
    "an old bucket": {"s3": {"bucket": "Acme_Pictures.2009"}},
    "a trial with a bucket's name": {"s3": {"bucket": "mine", "trial": {"enabled": True}}},
    "a trial with credentials": {"s3": {"bucket": "", "existingSecret": "any", "trial": {"enabled": True}}},
    "a Secret with dots": {"keys": {"existingSecret": "tandem.first-key.v1"}, "image": {"pullSecrets": ["9lives"]}},
    "a toleration of everything": {"workerDefaults": {"tolerations": [{"operator": "Exists"}]}},
    "a toleration with nothing under a key": {
        "workerDefaults": {"tolerations": [{"key": "a", "value": None, "effect": ""}]}
    },
    "a toleration that ends": {
        "ray": {
            "head": {
                "tolerations": [{"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}]
            }
        }
    },
    "variables from everywhere": {
        "extraEnv": [
            {"name": "my.name-1"},
            {"name": "A", "value": ""},
            {"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
            {"name": "C", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
            {"name": "D", "valueFrom": {"configMapKeyRef": {"name": "proxy", "key": "url", "optional": True}}},
        ]
    },
    "a wildcard host": {"ingress": {"enabled": True, "hosts": ["*.example.com", "localhost"]}},
    "a host for everything": {"ingress": {"enabled": True, "hosts": [""]}},
    "a range of IPv6": {"networkPolicy": {"apiServerCidrs": ["fd00::/8", "0.0.0.0/0"]}},
    "no policies and no operator": {"networkPolicy": {"enabled": False, "operatorNamespace": ""}},
    "a model of no known name": {"config": {"model": {"source": "~"}, "placements": {"a": {"model": "mine"}}}},
    "a model by its folder": {
        "config": {"model": {"source": "/models/sd15/"}, "placements": {"a": {"model": "sd15"}, "b": {"model": None}}}
    },
    "a model that is named in diffusion": {"config": {"diffusion": {"model": "shapes"}, "placements": {"a": {}}}},
    "texts alone": {
        "config": {"models": [{"source": "/m/x"}], "diffusion": {"replicas": 0}, "placements": {"a": {"model": "y"}}}
    },
    "two models without placements": {"config": {"models": [{"source": "/m/x"}]}},
    "a placement on no class": {
        "config": {
            "diffusion": {"gpu_class": "11gb", "num_gpus": 1},
            "placements": {"a": {}, "b": {"gpu_class": None, "num_gpus": 0, "num_cpus": 3}},
        }
    },
    "a checkpoint on a head that may grow": {
        "config": {"model": {"source": "/data/a.safetensors"}},
        "ray": {"head": {"memoryLimit": "16Gi"}},
    },
    "a volume of the chart's, mounted again": {
        "extraVolumeMounts": [{"name": "data", "mountPath": "/models", "subPath": "models"}]
    },
    "a folder below another": {
        "extraVolumes": [{"name": "models", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "models", "mountPath": "/data/models"}],
    },
    "a worker's logs on a disk": {
        "workerDefaults": {
            "extraVolumes": [{"name": "ray-logs", "emptyDir": {}}],
            "extraVolumeMounts": [{"name": "ray-logs", "mountPath": "/tmp/ray"}],
        }
    },
    "two constraints of one key": {
        "workerDefaults": {
            "topologySpreadConstraints": [
                {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"},
                {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"},
            ]
        }
    },
    "labels of others": {"workerDefaults": {"labels": {"kueue.x-k8s.io/queue-name": "gpus", "team": "pictures"}}},
    "Redis with TLS and a user": {
        "redis": {"gcs": {"address": "rediss://redis.internal:6380", "username": "ray", "existingSecret": "redis"}}
    },
    "a Job that stays": {"weights": {"enabled": True, "preload": {"ttlSeconds": None}}},
    "no preload at all": {"weights": {"enabled": True, "preload": None}},
    "monitoring of nothing": {"monitoring": {"podMonitor": None, "rules": None, "dashboards": None}},
    "a cluster's own user": {"podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}},
    "an empty config": {"config": {}},
    "groups of settings that are null": {"config": {"model": None, "diffusion": None, "placements": None}},
}
LOOSE = {"a cluster's own user", "a pod by an exponent"}
"""Which a cluster takes, and the rules of the house or their helpers do not."""


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_and_legal_is_taken(name: str) -> None:
    rendered = render(over(NEEDED, ODD[name]))
    faults = schema_faults(rendered.manifests, "1.33")
    assert [each for each in faults if not re.search(r"tolerations\.\d\.value is null$", each)] == []
    if name not in LOOSE:
        assert [fault for rule in (*RULES.values(), *LINKS.values()) for fault in rule(rendered)] == []


@pytest.mark.parametrize("path", [path for path, value in every_value() if isinstance(value, dict)], ids=dotted)
def test_a_group_that_is_null_is_refused_in_our_words_or_does_no_harm(path: Place) -> None:
    told = refusal(put(NEEDED, path, None))
    assert not told or re.search(rf"values: {re.escape(dotted(path))}[.:\w]*", told), told


def test_no_message_tells_a_secret() -> None:
    for room in ("keys", "redis.jobs", "s3", "webhooks", "tracing"):
        path = f"{room}.existingSecret"
        told = refusal(put(NEEDED, tuple(path.split(".")), "Hidden_7"))
        assert path in told
        assert "Hidden_7" not in told


def test_a_card_is_chosen_by_its_memory_and_by_its_nodes_label() -> None:
    """A label of all nodes, such as their architecture, takes no group's bounds away."""
    groups = [CPU, {**GPU, "gpuMemoryMiB": BOUNDS}, {**GPU, "name": "labelled", "nodeSelector": {"pool": "large"}}]
    values = over(NEEDED, {"workerGroups": groups, "workerDefaults": {"nodeSelector": {"kubernetes.io/arch": "amd64"}}})
    _, bound, labelled = (each["template"]["spec"] for each in render(values).cluster["workerGroupSpecs"])
    assert bound["nodeSelector"] == {"kubernetes.io/arch": "amd64"}
    (term,) = bound["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [(each["operator"], each["values"]) for each in term["matchExpressions"]] == [
        ("Gt", ["10000"]),
        ("Lt", ["12500"]),
    ]
    assert labelled["nodeSelector"] == {"pool": "large"}
    assert "affinity" not in labelled


def test_a_group_says_another_value_of_a_variable() -> None:
    groups = [{**CPU, "extraEnv": [{"name": "A", "value": "own"}]}, {**CPU, "name": "other"}]
    values = over(NEEDED, {"extraEnv": [{"name": "A", "value": "all"}], "workerGroups": groups})
    cluster = render(values).cluster
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    told = [
        [each["value"] for each in one["template"]["spec"]["containers"][0]["env"] if each["name"] == "A"]
        for one in pods
    ]
    assert told == [["all"], ["own"], ["all"]]


def test_pods_that_only_pull_choose_their_nodes_and_nothing_else() -> None:
    """One whose affinity kept the group's pods apart would keep from the very nodes that those are on."""
    node = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference": {"matchFields": []}}]}
    apart = {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "kubernetes.io/hostname"}]}
    values = over(
        NEEDED,
        {
            "prePull": {"enabled": True},
            "workerDefaults": {
                "affinity": {"nodeAffinity": node, "podAntiAffinity": apart},
                "priorityClassName": "first",
                "runtimeClassName": "nvidia",
            },
        },
    )
    rendered = render(values)
    for each in rendered.of("DaemonSet"):
        spec = each["spec"]["template"]["spec"]
        assert spec["affinity"].keys() == {"nodeAffinity"}
        assert "priorityClassName" not in spec
    for group in rendered.cluster["workerGroupSpecs"]:
        assert group["template"]["spec"]["affinity"].keys() == {"nodeAffinity", "podAntiAffinity"}
        assert group["template"]["spec"]["priorityClassName"] == "first"


def test_a_job_without_a_time_to_live_stays() -> None:
    spec = render(over(NEEDED, ODD["a Job that stays"])).one("Job")["spec"]
    assert "ttlSecondsAfterFinished" not in spec


def test_ray_is_told_the_user_of_its_redis() -> None:
    told = render(over(NEEDED, ODD["Redis with TLS and a user"])).cluster["gcsFaultToleranceOptions"]
    assert told["redisUsername"] == {"value": "ray"}
    assert told["redisAddress"] == "rediss://redis.internal:6380"


def test_tests_and_the_store_for_trials_go_where_they_may() -> None:
    place = {"nodeSelector": {"pool": "a"}, "tolerations": [{"key": "a", "operator": "Exists"}]}
    rendered = render(over(NEEDED, {"tests": place, "s3": {"trial": {"enabled": True, **place}}}))
    (store,) = [each for each in rendered.of("Deployment") if each["metadata"]["name"].endswith("s3-trial")]
    for spec in (store["spec"]["template"]["spec"], *(each["spec"] for each in rendered.of("Pod"))):
        assert {name: spec[name] for name in place} == place


def test_what_is_overfilled_names_the_groups_that_could_grow() -> None:
    groups = [
        {**CPU, "max": 1},
        {**GPU, "gpuMemoryMiB": BOUNDS, "max": 1},
        {**GPU, "name": "more", "gpuMemoryMiB": BOUNDS, "max": 2},
    ]
    config = {"placements": {"a": {"gpu_class": "11gb", "num_gpus": 1, "replicas": 4}}}
    told = refusal(over(NEEDED, {"config": config, "workerGroups": groups}))
    assert "raise `workerGroups[1].max` (gpu, now 1) or `workerGroups[2].max` (more, now 2), or lower" in told
    many = refusal(over(NEEDED, {"config": {"http": {"replicas": 40, "num_cpus": 1}}}))
    assert "raise `workerGroups[0].max` (cpu, now 4), or lower" in many, "a pod with a card is none for HTTP"


def test_the_notes_of_an_upgrade_wait_for_the_second_cluster() -> None:
    """`Ready` is true all the while, on a release that serves."""
    first, again = render(NEEDED).notes, render(NEEDED, upgrade=True).notes
    assert "condition=Ready" in first
    assert "UpgradeInProgress" not in first
    assert "condition=Ready" not in again
    assert again.index("UpgradeInProgress=true") < again.index("UpgradeInProgress=false")
    none = render(over(NEEDED, {"ray": {"upgrade": {"type": "None"}}}), upgrade=True).notes
    assert "UpgradeInProgress" not in none


def test_the_notes_say_which_door_is_not_open() -> None:
    told = render(over(NEEDED, {"ingress": {"hosts": ["a.example.com"]}, "gateway": {"hostnames": ["b"]}})).notes
    assert "ingress.hosts are given, and ingress.enabled is off" in told
    assert "gateway.hostnames are given, and gateway.enabled is off" in told
    assert "is off: there is no" not in render(NEEDED).notes


def test_the_notes_give_an_address_that_can_be_asked() -> None:
    told = render(over(NEEDED, {"ingress": {"enabled": True, "hosts": ["*.example.com"]}})).notes
    assert "URL=http://any.example.com" in told


def test_a_new_node_has_time_to_boot_and_to_pull_the_image() -> None:
    """The autoscaler's clock runs from a pod's creation until its container runs. What it gives up starts all over."""
    variables = render(NEEDED).cluster["autoscalerOptions"]["env"]
    (seconds,) = [each["value"] for each in variables if each["name"].endswith("ALLOCATE_STATUS_TIMEOUT_S")]
    assert int(seconds) >= 1800


def test_the_notes_say_where_the_operator_must_be() -> None:
    told = over(NEEDED, {"networkPolicy": {"operatorNamespace": "operators"}})
    assert "operator must be in the namespace operators" in render(told).notes
    assert "operator must be" not in render(over(told, {"networkPolicy": {"enabled": False}})).notes
