"""A new version of the executed chart: a second cluster beside the first, on the same stores; traffic moves, and the
first one is deleted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.chart import over, render
from support.executed import NODES, a_site
from support.ray_clusters import START_S, RayCluster
from support.server import wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(sys.platform != "linux", reason="pods have addresses in 127.0.0.0/8 and a first process"),
]


def test_a_second_cluster_takes_over_and_no_request_fails(tmp_path: Path) -> None:
    with a_site(tmp_path) as site, site.traffic() as traffic:
        newer = render(over(site.stores.values(), {"image": {"tag": "0.2.0"}}), upgrade=True)
        assert newer.cluster != site.cluster.release.cluster, "KubeRay would change nothing"
        with RayCluster(newer, site.stores.ground(), NODES) as second:
            traffic.more(4)
            second.put()
            wait_until(lambda: second.running() and second.endpoints(), 2 * START_S, "the second cluster to serve")
            traffic.more(8)  # both draw from the one queue
            first, site.cluster = site.cluster, second
            site.service.switch(second)
            site.wait()
            for pod, took in first.retire().items():
                print(f"{pod}: {took:.0f} s")
            traffic.more(8)
            traffic.end()
        site.holds(traffic)
