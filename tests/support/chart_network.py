"""Who reaches whom under the chart's NetworkPolicies: what Kubernetes says of them, as a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any

from support.chart import NAMESPACE, Manifest, Pods
from support.chart_rules import selects


@dataclass(frozen=True)
class Somebody:
    """A pod, by its labels and its namespace; `address`, a range, is somebody outside the cluster."""

    labels: Mapping[str, str]
    namespace: str = NAMESPACE
    address: str = ""

    @classmethod
    def of(cls, pods: Pods) -> Somebody:
        return cls(pods.labels)


def reaches(policies: Sequence[Manifest], source: Somebody, target: Somebody, port: int) -> bool:
    """Whether a connection comes through: whoever is selected for a direction needs a rule for it, the others none.
    Ports are numbers here, as everywhere in the chart's policies."""
    return _lets(policies, source, "Egress", target, port) and _lets(policies, target, "Ingress", source, port)


def _lets(policies: Sequence[Manifest], own: Somebody, side: str, other: Somebody, port: int) -> bool:
    if own.address:
        return True
    governing = [
        each["spec"]
        for each in policies
        if side in each["spec"]["policyTypes"]
        and own.namespace == NAMESPACE
        and selects(each["spec"]["podSelector"], own.labels)
    ]
    if not governing:
        return True
    rules = [rule for spec in governing for rule in spec.get(side.lower()) or ()]
    return any(_ports(rule, port) and _peers(rule, "from" if side == "Ingress" else "to", other) for rule in rules)


def _ports(rule: Mapping[str, Any], port: int) -> bool:
    given = rule.get("ports")
    return not given or any(each.get("port") == port and each.get("protocol", "TCP") == "TCP" for each in given)


def _peers(rule: Mapping[str, Any], name: str, other: Somebody) -> bool:
    given = rule.get(name)
    return not given or any(_is(peer, other) for peer in given)


def _is(peer: Mapping[str, Any], other: Somebody) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        return bool(other.address) and _holds(block["cidr"], other.address, block.get("except", ()))
    if other.address:
        return False
    spaces = peer.get("namespaceSelector")
    within = (
        other.namespace == NAMESPACE
        if spaces is None
        else selects(spaces, {"kubernetes.io/metadata.name": other.namespace})
    )
    return within and selects(peer.get("podSelector", {}), other.labels)


def _holds(cidr: str, address: str, but: Sequence[str]) -> bool:
    """Whether any address of the range `address` is let through. A pod's is not among them: those change."""
    wanted, block = ip_network(address), ip_network(cidr, strict=False)
    if wanted.version != block.version or not wanted.overlaps(block):
        return False
    both = max(wanted, block, key=lambda each: each.prefixlen)
    without = [ip_network(each, strict=False) for each in but]
    return not any(each.version == both.version and both.subnet_of(each) for each in without)  # type: ignore[arg-type]
