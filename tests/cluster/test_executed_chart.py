"""The chart, executed: its `heterogeneous` release on a local Ray cluster, a node for each pod of its worker groups,
deployed as KubeRay deploys it, under traffic, while what happens to clusters happens to it.

The GPUs are pretended: Ray counts them, and the replicas compute on the CPU. The order of the tests is that of a
cluster's life; each leaves it whole.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest
import redis
from support.executed import CLASSES, LARGE, Site, a_site
from support.ray_clusters import START_S
from support.server import wait_until
from support.traffic import Done, Traffic

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="pods have addresses in 127.0.0.0/8 and a first process"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with a_site(tmp_path_factory.mktemp("executed")) as found:
        yield found


def large(done: Done) -> bool:
    return done.order["width"] == LARGE


def worker_groups(site: Site, traffic: Traffic) -> dict[str, str]:
    """The worker group that drew each job, by what the job's record says of its worker, whose name begins with its
    node."""
    nodes = {node: pod.group for node, pod in site.cluster.nodes().items()}
    with redis.Redis.from_url(site.stores.jobs.url) as client:
        found = {each.job["id"]: client.hget(f"tandem:job:{each.job['id']}", "worker") for each in traffic.done}
    return {job: nodes[worker.decode().partition(":")[0]] for job, worker in found.items()}


def test_every_deployment_and_every_job_is_on_the_nodes_of_its_class(site: Site) -> None:
    nodes = site.cluster.nodes()
    for name, replicas in site.cluster.replicas().items():
        found = {site.cluster.gpu_class(nodes[each["node_id"]]) for each in replicas}
        assert found == {CLASSES[name]}, name
        assert all(nodes[each["node_id"]] is not site.cluster.head for each in replicas), name
    with site.traffic() as traffic:
        traffic.more(16)
    groups = worker_groups(site, traffic)
    assert {groups[each.job["id"]] for each in traffic.done if large(each)} == {"gpu-11gb"}
    assert {groups[each.job["id"]] for each in traffic.done if not large(each)} >= {"gpu-4gb"}
    site.holds(traffic)


def test_a_killed_worker_node_costs_its_jobs_one_attempt(site: Site) -> None:
    with site.traffic() as traffic:
        pod = site.holder("gpu-11gb")
        pod.kill()
        assert [each.group for each in site.cluster.heal()] == ["gpu-11gb"]
        traffic.more(12)
        site.wait()
        traffic.more(4, such=large)
    site.holds(traffic, repeated=True)
    assert max(each.job["attempt"] for each in traffic.done) == 2


def test_a_killed_controller_comes_back_and_finds_its_replicas(site: Site) -> None:
    replicas = site.replica_pids()
    with site.traffic() as traffic:
        traffic.more(2)
        (controller,) = site.cluster.processes("ServeController")
        controller.send_signal(signal.SIGKILL)
        traffic.more(4)
        wait_until(
            lambda: {each.pid for each in site.cluster.processes("ServeController")} - {controller.pid},
            START_S,
            "another controller",
        )
        site.wait()
    site.holds(traffic)
    assert site.replica_pids() == replicas


def test_a_head_that_is_killed_is_missed_by_nobody_and_finds_its_cluster_again(site: Site) -> None:
    replicas = site.replica_pids()
    with site.traffic() as traffic:
        traffic.more(2)
        site.cluster.head.kill()
        traffic.more(8)
        assert [each.group for each in site.cluster.heal()] == ["headgroup"]
        site.wait()
        traffic.more(4)
    site.holds(traffic)
    assert site.replica_pids() == replicas


SLEEPY = {"replicas": 0, "min_replicas": 0, "max_replicas": 1, "idle_s": 5}


def test_a_changed_configuration_replaces_every_replica_and_what_may_sleep_is_woken_by_an_order(site: Site) -> None:
    """No request fails meanwhile."""
    before = {each["replica_id"] for replicas in site.cluster.replicas().values() for each in replicas}
    with site.traffic(model="sd15") as traffic:
        traffic.more(2)
        site.cluster.put(site.stores.release(placements={"xl": SLEEPY}))

        def replaced() -> bool:
            after = site.cluster.replicas()
            stale = before & {each["replica_id"] for replicas in after.values() for each in replicas}
            return not stale and after.get("Diffusion-xl") == [] and site.whole()

        wait_until(replaced, START_S, "every replica to be replaced, and xl to sleep")
        assert site.cluster.application()["deployed_app_config"]["args"]["placements"]["xl"]["min_replicas"] == 0
        traffic.more(4)
    site.holds(traffic)
    with site.traffic(users=1, model="sdxl") as traffic:
        traffic.more(2)
        assert len(site.cluster.replicas()["Diffusion-xl"]) == 1
    site.holds(traffic)
    wait_until(lambda: site.cluster.replicas().get("Diffusion-xl") == [], START_S, "xl to sleep again")
