"""Who reaches whom: what the release needs comes through its policies, and nobody else gets to Ray or a store."""

import copy
import itertools
from typing import Any

import pytest
from support.chart import CI, Rendered, pods_of, render
from support.chart_network import Somebody, reaches

STRANGER = Somebody({"app": "stranger"})
OPERATOR = Somebody({"app.kubernetes.io/name": "kuberay"}, "kuberay-system")
PROMETHEUS = Somebody({"app.kubernetes.io/name": "prometheus"}, "monitoring")
ELSEWHERE = Somebody({"app": "stranger"}, "elsewhere")
DASHBOARD, CLIENT, GCS, METRICS, HTTP, REDIS, S3 = 8265, 10001, 6379, 8080, 8000, 6379, 5000
OPEN = {HTTP}
"""Ports at which everybody may knock, as long as `networkPolicy.clients` says nothing."""


@pytest.fixture
def pods(release: Rendered) -> dict[str, Somebody]:
    """One pod of each kind, by a short name: head, worker, redis-cleanup, redis-jobs, s3-trial, test, preload, ..."""
    if not release.values["networkPolicy"]["enabled"]:
        pytest.skip("this example has no policies")
    found = {}
    for each in pods_of(release.manifests):
        labels = each.labels
        found[labels.get("ray.io/node-type") or labels["app.kubernetes.io/component"]] = Somebody.of(each)
    return found


def test_what_belongs_together_comes_together(release: Rendered, pods: dict[str, Somebody]) -> None:
    policies = release.of("NetworkPolicy")
    ray = [pods["head"], pods["worker"]]
    for (one, other), port in itertools.product(itertools.product(ray, ray), (GCS, DASHBOARD, HTTP, METRICS, 12345)):
        assert reaches(policies, one, other, port)
    for name, port in (("redis-jobs", REDIS), ("redis-cache", REDIS), ("s3-trial", S3)):
        if name in pods:
            assert all(reaches(policies, one, pods[name], port) for one in ray), name
    if "redis-gcs" in pods:
        assert reaches(policies, pods["head"], pods["redis-gcs"], REDIS)
        assert reaches(policies, pods["redis-cleanup"], pods["redis-gcs"], REDIS)
    if "test" in pods:
        assert reaches(policies, pods["test"], pods["worker"], HTTP)
    assert reaches(policies, OPERATOR, pods["head"], DASHBOARD)
    assert reaches(policies, PROMETHEUS, pods["head"], METRICS)
    assert reaches(policies, PROMETHEUS, pods["worker"], METRICS)


def test_nobody_else_gets_in(release: Rendered, pods: dict[str, Somebody]) -> None:
    """Who reaches Ray's dashboard or its workers' ports runs code there; who reaches the job Redis reads prompts."""
    policies = release.of("NetworkPolicy")
    clients = release.values["networkPolicy"]["clients"]
    tools = [pods[each] for each in ("test", "preload") if each in pods]
    outsiders = [STRANGER, ELSEWHERE, PROMETHEUS, OPERATOR, *tools]
    for outsider, name in itertools.product(outsiders, pods):
        for port in (GCS, DASHBOARD, CLIENT, METRICS, HTTP, S3, 12345):
            meant = port in OPEN and name in ("head", "worker", "redis-cleanup") and not clients
            meant |= outsider is OPERATOR and name == "head" and port == DASHBOARD
            meant |= outsider is PROMETHEUS and name in ("head", "worker", "redis-cleanup") and port == METRICS
            meant |= name in ("head", "worker", "redis-cleanup") and port == HTTP and outsider is pods.get("test")
            told = f"{dict(outsider.labels)} in {outsider.namespace} -> {name}:{port}"
            assert reaches(policies, outsider, pods[name], port) <= meant, told


def test_one_store_is_not_the_way_to_another(release: Rendered, pods: dict[str, Somebody]) -> None:
    policies = release.of("NetworkPolicy")
    stores = [name for name in pods if name.startswith(("redis-", "s3-")) and name != "redis-cleanup"]
    outside = Somebody({}, address="203.0.113.7/32")
    for one in stores:
        for other in pods:
            if other != one:
                assert not reaches(policies, pods[one], pods[other], REDIS)
                assert not reaches(policies, pods[one], pods[other], HTTP)
        assert not reaches(policies, pods[one], outside, 443)


@pytest.mark.parametrize(
    ("block", "open_"),
    [
        ({"cidr": "0.0.0.0/0"}, True),
        ({"cidr": "203.0.113.0/24"}, True),
        ({"cidr": "0.0.0.0/0", "except": ["203.0.113.0/24"]}, False),
        ({"cidr": "0.0.0.0/0", "except": ["203.0.113.7/32"]}, False),
        ({"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}, True),
        ({"cidr": "198.51.100.0/24"}, False),
        ({"cidr": "::/0"}, False),
    ],
    ids=str,
)
def test_a_way_out_that_a_range_opens_is_found(block: dict[str, Any], open_: bool) -> None:
    """A planted rule: the store for trials may call everywhere."""
    release = render(next(file for file in CI if file.name.startswith("network-policy")))
    policies = [copy.deepcopy(dict(each)) for each in release.of("NetworkPolicy")]
    (store,) = [pods for pods in pods_of(release.manifests) if pods.where == "Deployment/tandem-s3-trial"]
    for each in policies:
        if each["metadata"]["name"] == "tandem-s3-trial":
            each["spec"] |= {"policyTypes": ["Ingress", "Egress"], "egress": [{"to": [{"ipBlock": block}]}]}
    outside = Somebody({}, address="203.0.113.7/32")
    assert reaches(policies, Somebody.of(store), outside, 443) is open_


def test_where_egress_is_limited_only_what_is_named_is_reached() -> None:
    release = render(next(file for file in CI if file.name.startswith("network-policy")))
    policies, values = release.of("NetworkPolicy"), release.values["networkPolicy"]
    named = Somebody({}, address=values["egress"][0]["to"][0]["ipBlock"]["cidr"])
    api = Somebody({}, address=values["apiServerCidrs"][0])
    elsewhere = Somebody({}, address="203.0.113.7/32")
    client = Somebody({}, values["clients"][0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"])
    for each in pods_of(release.manifests):
        if not each.is_ray:
            continue
        pod = Somebody.of(each)
        assert reaches(policies, pod, named, 443)
        assert all(reaches(policies, pod, elsewhere, port) for port in (53, 5353)), "names are asked for anywhere"
        assert not reaches(policies, pod, named, 80)
        assert not reaches(policies, pod, elsewhere, 443)
        # The autoscaler in the head's pod, and nobody else, asks for pods.
        assert reaches(policies, pod, api, 443) is (each.labels["ray.io/node-type"] == "head")
        assert reaches(policies, client, pod, HTTP)
        assert not reaches(policies, ELSEWHERE, pod, HTTP)
