"""A real Kubernetes API server on loopback: etcd and kube-apiserver out of `KUBEBUILDER_ASSETS`, the folder that
controller-runtime's `setup-envtest use -p path` prints. No controllers and no kubelet: objects are stored and checked,
and nothing becomes of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from support.server import free_port

ASSETS = "KUBEBUILDER_ASSETS"
PROGRAMS = ("etcd", "kube-apiserver")
TOKEN = "loopback-only"
START_S = 120.0


def missing() -> str:
    """Why there is no API server to be had; empty where there is."""
    folder = os.environ.get(ASSETS)
    if not folder:
        return f"{ASSETS} is not set: the folder with {' and '.join(PROGRAMS)} that `setup-envtest use -p path` prints"
    lacks = [name for name in PROGRAMS if not os.access(Path(folder) / name, os.X_OK)]
    return f"{ASSETS}={folder} has no {' and no '.join(lacks)}" if lacks else ""


@dataclass(frozen=True)
class ApiServer:
    """Owns nothing: the processes end with `running`. `client` speaks as the cluster's administrator."""

    client: httpx.Client
    kubeconfig: str

    def apply(self, manifest: dict[str, Any]) -> None:
        """Made, whatever of it is there already left as it is."""
        answer = self.client.post(self._collection(manifest), json=manifest)
        assert answer.is_success or answer.status_code == httpx.codes.CONFLICT, answer.text

    def kinds(self) -> dict[str, tuple[str, bool]]:
        """Path of every listable kind of object, by `<group version> <kind>`, and whether it lies in a namespace."""
        found = {}
        groups = [group["preferredVersion"]["groupVersion"] for group in self._get("/apis")["groups"]]
        for version in ("v1", *groups):
            root = f"/api/{version}" if version == "v1" else f"/apis/{version}"
            for each in self._get(root)["resources"]:
                if "/" not in each["name"] and {"list", "delete"} <= set(each["verbs"]):
                    found[f"{version} {each['kind']}"] = f"{root}|{each['name']}", each["namespaced"]
        return found

    def objects(self, namespace: str) -> dict[str, dict[str, Any]]:
        """Everything in the namespace, by `<kind>/<name>`; but for events, which the server writes and lets expire."""
        found = {}
        for name, (path, namespaced) in self.kinds().items():
            if namespaced and not name.endswith(" Event"):
                root, plural = path.split("|")
                for each in self._get(f"{root}/namespaces/{namespace}/{plural}")["items"]:
                    found[f"{name.rpartition(' ')[2]}/{each['metadata']['name']}"] = each
        return found

    def established(self, definition: dict[str, Any]) -> None:
        """Waits until a custom kind is served, and the server says so: one comes before the other, now and then."""
        spec = definition["spec"]
        for version in spec["versions"]:
            path = f"/apis/{spec['group']}/{version['name']}"
            for each in (path, f"{path}/{spec['names']['plural']}"):
                wait_for(lambda each=each: self.client.get(each).is_success, f"{each} to be served")

    def _collection(self, manifest: dict[str, Any]) -> str:
        version, kind = manifest["apiVersion"], manifest["kind"]
        path, namespaced = self.kinds()[f"{version} {kind}"]
        root, plural = path.split("|")
        return f"{root}/namespaces/{manifest['metadata']['namespace']}/{plural}" if namespaced else f"{root}/{plural}"

    def _get(self, path: str) -> Any:
        answer = self.client.get(path)
        assert answer.is_success, f"{path}: {answer.text}"
        return answer.json()


@contextlib.contextmanager
def running(folder: Path) -> Iterator[ApiServer]:
    """Both processes, in a folder of their own; they end with the block."""
    assets = Path(os.environ[ASSETS])
    store, peers, port = free_port(), free_port(), free_port()
    key = folder / "service-accounts.pem"
    key.write_bytes(
        rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
    tokens = folder / "tokens.csv"
    tokens.write_text(f"{TOKEN},admin,admin,system:masters\n", encoding="utf-8")
    etcd = [
        assets / "etcd",
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls=http://127.0.0.1:{store}",
        f"--advertise-client-urls=http://127.0.0.1:{store}",
        f"--listen-peer-urls=http://127.0.0.1:{peers}",
        "--unsafe-no-fsync",
    ]
    server = [
        assets / "kube-apiserver",
        f"--etcd-servers=http://127.0.0.1:{store}",
        f"--cert-dir={folder / 'certificates'}",
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",
        f"--secure-port={port}",
        f"--token-auth-file={tokens}",
        "--authorization-mode=RBAC",
        "--service-account-issuer=https://127.0.0.1/",
        f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}",
        "--service-cluster-ip-range=10.0.0.0/24",
        "--disable-admission-plugins=ServiceAccount",
    ]
    with _process(etcd, folder / "etcd.log"), _process(server, folder / "kube-apiserver.log") as process:
        address = f"https://127.0.0.1:{port}"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        # The server makes its certificate itself, as it starts.
        with httpx.Client(base_url=address, headers=headers, verify=False, timeout=30.0) as client:
            wait_for(lambda: _ready(client, process), "the API server to be ready")
            yield ApiServer(client, _kubeconfig(address))


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {START_S:g} s for {what}"
        time.sleep(0.1)


def _ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "kube-apiserver has ended; see its log"
    try:
        return client.get("/readyz").is_success
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def _process(command: list[Any], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out, subprocess.Popen([*map(str, command)], stdout=out, stderr=out) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _kubeconfig(address: str) -> str:
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": {"server": address, "insecure-skip-tls-verify": True}}],
            "users": [{"name": "admin", "user": {"token": TOKEN}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "admin"}}],
            "current-context": "here",
        }
    )
