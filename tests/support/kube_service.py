"""A Kubernetes service before the pods of a RayCluster: a connection goes to one of the pods that are ready."""

from __future__ import annotations

import random
import threading
from typing import Self

from support.ray_clusters import RayCluster
from support.tcp_proxy import TcpProxy

PROBE_S = 1.0


class KubeService(TcpProxy):
    """Before the pods of `cluster`.

    Owns: the thread that asks the pods whether they are ready.
    """

    def __init__(self, cluster: RayCluster) -> None:
        super().__init__(0)
        self._cluster = cluster
        self._ready: list[tuple[str, int]] = []
        self._over = threading.Event()
        self._probing = threading.Thread(target=self._probe, name="readiness", daemon=True)

    def __enter__(self) -> Self:
        super().__enter__()
        self._probing.start()
        return self

    def __exit__(self, *rest: object) -> None:
        self._over.set()
        self._probing.join(30)
        super().__exit__(None, None, None)

    def switch(self, cluster: RayCluster) -> None:
        """New connections go to another cluster; those that are open stay."""
        self._cluster, self._ready = cluster, cluster.endpoints()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def address(self) -> tuple[str, int]:
        ready = self._ready
        if not ready:
            raise ConnectionRefusedError
        return random.choice(ready)

    def _probe(self) -> None:
        while not self._over.wait(PROBE_S):
            self._ready = self._cluster.endpoints()
