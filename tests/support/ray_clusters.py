"""A rendered RayService as KubeRay would run it, in processes of this machine: a RayCluster of a head and one pod for
each node of its worker groups, the Serve configuration put to the head's dashboard, and a service before its proxies.

In KubeRay's place, not of it: addresses, ports that this machine shares out, and how many nodes a group has.
"""

from __future__ import annotations

import random
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
from support.chart import Rendered
from support.pods import Ground, Pod, environment, start_params, told
from support.server import free_port, title, wait_until

from serve.placements import GPU_CLASS_LABEL

SERVE_PORT, DASHBOARD_PORT = 8000, 8265
HEAD = "headgroup"
START_S = 300.0
"""A cluster of five nodes takes a minute on two idle cores."""


class RayCluster:
    """One RayCluster of a RayService. `nodes` are how many pods a worker group has; by default its `replicas`.

    Owns: its pods, and the folder of Ray's sockets and logs.
    """

    def __init__(self, release: Rendered, ground: Ground, nodes: Mapping[str, int] | None = None) -> None:
        self.release, self.ground = release, ground.with_secrets_of(release)
        self.name = f"tandem-{secrets.token_hex(3)}"
        self._net = f"127.{random.randrange(16, 250)}.{random.randrange(1, 250)}"
        self._token = secrets.token_hex(24)
        self._gcs_port, self._client_port = free_port(), free_port()
        self._temp = Path(tempfile.mkdtemp(prefix="tandem-"))  # short: Ray keeps Unix sockets in it
        self._made = 0
        self._groups = {group["groupName"]: group for group in release.cluster["workerGroupSpecs"]}
        self.head = self._head()
        self.workers: list[Pod] = []
        self._nodes = nodes or {}

    def __enter__(self) -> RayCluster:
        self.head.start()
        wait_until(lambda: self.nodes() or not self.head.alive, START_S, "the head")
        assert self.head.alive, self.head.log.read_text(errors="replace")
        for name, group in self._groups.items():
            for _ in range(self._nodes.get(name, group["replicas"])):
                pod = self.join(name)
                # All at once they would take so long on two cores that Ray gives them up.
                wait_until(lambda pod=pod: pod in self.nodes().values(), START_S, pod.name)  # type: ignore[misc]
        return self

    def __exit__(self, *_: object) -> None:
        for pod in (*self.workers, self.head):
            pod.kill()
        shutil.rmtree(self._temp, ignore_errors=True)

    # Pods.

    def join(self, group: str) -> Pod:
        """One more pod of a worker group."""
        self.workers.append(pod := self._worker(self._groups[group]))
        pod.start()
        return pod

    def heal(self) -> list[Pod]:
        """New pods in the place of those that have ended, as the operator makes them. A head keeps its address."""
        dead = [pod for pod in (self.head, *self.workers) if not pod.alive]
        for pod in dead:
            pod.kill()
            if pod is self.head:
                self.head = self._head()
                self.head.start()
            else:
                self.workers.remove(pod)
                self.join(pod.group)
        return dead

    def retire(self) -> dict[str, float]:
        """All of it is deleted, as the one that an upgrade has replaced. Seconds that each worker took to end."""
        nodes = {pod.name: node for node, pod in self.nodes().items()}

        def end(pod: Pod) -> float:
            spec = self._groups[pod.group]["template"]["spec"]
            *shell, script = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            # There it finds out by itself which node it is on; here all are on one machine.
            own = script.replace("ray drain-node", f"ray drain-node --node-id {nodes[pod.name]}")
            return pod.end([*shell, own], spec["terminationGracePeriodSeconds"])

        with ThreadPoolExecutor(len(self.workers)) as each:
            took = dict(zip((pod.name for pod in self.workers), each.map(end, self.workers), strict=True))
        self.head.kill()
        return took

    def processes(self, name: str) -> list[psutil.Process]:
        """Those with this in their title, such as `ServeReplica:tandem:Ingress` or `ServeController`."""
        return [each for pod in (self.head, *self.workers) for each in pod.processes() if name in title(each)]

    def _head(self) -> Pod:
        template = self.release.cluster["headGroupSpec"]
        address = f"{self._net}.1"
        cluster = self.release.cluster
        env = {
            "RAY_ADDRESS": f"{address}:{self._gcs_port}",
            "RAY_external_storage_namespace": self.name,
            "RAY_timeout_ms_task_wait_for_death_info": "0",
            "RAY_gcs_server_request_timeout_seconds": "5",
            "RAY_SERVE_KV_TIMEOUT_S": "5",
        }
        params = {"head": "", "port": str(self._gcs_port), "ray-client-server-port": str(self._client_port)}
        params |= {"dashboard-host": "0.0.0.0", "no-monitor": ""}
        if "gcsFaultToleranceOptions" in cluster:
            options = cluster["gcsFaultToleranceOptions"]
            env["RAY_REDIS_ADDRESS"] = options["redisAddress"]
            reference = options["redisPassword"]["valueFrom"]["secretKeyRef"]
            params["redis-password"] = self.ground.secrets[reference["name"]][reference["key"]]
        return self._pod(template, HEAD, address, params, env)

    def _worker(self, group: Mapping[str, Any]) -> Pod:
        address = f"{self._net}.{2 + self._made}"
        gcs = f"{self._net}.1:{self._gcs_port}"
        env = {"RAY_ADDRESS": gcs, "RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        return self._pod(group, group["groupName"], address, {"address": gcs}, env)

    def _pod(
        self, group: Mapping[str, Any], name: str, address: str, params: Mapping[str, str], env: Mapping[str, str]
    ) -> Pod:
        self._made += 1
        pod, template = f"{self.name}-{name}-{self._made}", group["template"]
        mounts = self.ground.mounts(self.release, template["spec"], pod)
        (container, *_) = template["spec"]["containers"]
        given = start_params(template, {**params, **group["rayStartParams"]}, group.get("labels", {}))
        given |= {"node-ip-address": address, "min-worker-port": "0", "max-worker-port": "0"}
        given["include-log-monitor"] = "false"
        given["temp-dir"] = str(self._temp / str(self._made))  # in the place of /tmp/ray
        own = {"RAY_CLUSTER_NAME": self.name, "RAY_NODE_TYPE_NAME": name}
        if self.release.cluster["authOptions"]["mode"] == "token":
            own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}
        return Pod(
            name=pod,
            group=name,
            address=address,
            arguments=tuple(f"--{key}={value}" if value else f"--{key}" for key, value in given.items()),
            environment={**own, **env, **environment(container, self.ground.secrets, mounts)},
            log=self.ground.folder / f"{pod}.log",
        )

    # What the operator asks of the head's dashboard.

    def put(self, release: Rendered | None = None) -> None:
        """The release's Serve configuration, as it is but for the folder of its volume."""
        release = release or self.release
        mounts = self.ground.mounts(release, release.cluster["headGroupSpec"]["template"]["spec"], "operator")
        answer = self._api("PUT", "/api/serve/applications/", json=told(release.serve_config, mounts))
        assert answer.status_code == 200, answer.text

    def application(self) -> dict[str, Any]:
        """As Serve tells of it; nothing while there is none or nobody to ask."""
        try:
            answer = self._api("GET", "/api/serve/applications/")
        except httpx.HTTPError:
            return {}
        found: dict[str, Any] = answer.json()["applications"].get("tandem", {}) if answer.status_code == 200 else {}
        return found

    def replicas(self) -> dict[str, list[dict[str, Any]]]:
        """Of each deployment."""
        return {name: each["replicas"] for name, each in self.application().get("deployments", {}).items()}

    def running(self) -> bool:
        return self.application().get("status") == "RUNNING"

    def nodes(self) -> dict[str, Pod]:
        """The pod of each node that lives, by the node's id; none while there is nobody to ask."""
        try:
            answer = self._api("GET", "/api/v0/nodes?detail=false")
        except httpx.HTTPError:
            return {}
        found = answer.json()["data"]["result"]["result"] if answer.status_code == 200 else ()
        pods = {pod.address: pod for pod in (self.head, *self.workers)}
        return {
            each["node_id"]: pods[each["node_ip"]]
            for each in found
            if each["state"] == "ALIVE" and each["node_ip"] in pods
        }

    def gpu_class(self, pod: Pod) -> str | None:
        """Of the group that the pod is of, by the chart."""
        group = self._groups.get(pod.group, {})
        return group.get("labels", {}).get(GPU_CLASS_LABEL)

    def _api(self, method: str, path: str, **rest: Any) -> httpx.Response:
        url = f"http://{self.head.address}:{DASHBOARD_PORT}{path}"
        headers = {"x-ray-authorization": f"Bearer {self._token}"}
        return httpx.request(method, url, headers=headers, timeout=30, **rest)

    # Endpoints of the service.

    def endpoints(self) -> list[tuple[str, int]]:
        """Serve's proxies on workers that would pass the readiness probe which KubeRay gives their pods; the head is
        not among them (`excludeHeadPodFromServeSvc`)."""
        return [(pod.address, SERVE_PORT) for pod in self.workers if pod.alive and _healthy(pod.address)]


def _healthy(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}:{SERVE_PORT}/-/healthz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
