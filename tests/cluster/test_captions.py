"""A server that describes pictures, under Ray: batches, a pool that sleeps, and one that starts again."""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from support.captioners import llava_folder, picture
from support.server import Server, launch, stop, wait_until

from serve.client import Caption, Client

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
COLOURS = ("red", "green", "blue", "orange", "black", "white")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("captions")
    captions = {"source": str(llava_folder(home / "a-llava")), "max_new_tokens": 6, "max_batch_size": 4}
    tree = {"diffusion": {"replicas": 0}, "captions": captions | {"min_replicas": 0, "batch_wait_s": 0.2}}
    (config := home / "tandem.yaml").write_text(yaml.safe_dump(tree))
    server = launch(home, TANDEM_CONFIG=str(config))
    yield server
    stop(server)


def batches(server: Server) -> tuple[float, float]:
    """(batches, pictures in them) so far, as Prometheus would read them from Ray's agent."""
    text = httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10).text
    values = {"_count": 0.0, "_sum": 0.0}
    for line in text.splitlines():
        for end in values:
            if line.startswith(f"ray_tandem_caption_batch_images{end}"):
                values[end] += float(line.rpartition(" ")[2])
    return values["_count"], values["_sum"]


def test_pictures_that_come_together_share_batches(server: Server) -> None:
    with Client(server.url) as client:
        pools = {pool.name: pool for pool in client.pools() or ()}
        assert pools["captions"].detail == "1 awake", "one that may sleep is tried at the start"
        alone = {colour: client.caption(picture(colour)) for colour in COLOURS}
        assert len({each.caption for each in alone.values()}) > 2
        wait_until(lambda: batches(server)[0] == len(COLOURS), 30, "the metrics to be told")

        def asked(colour: str) -> Caption:
            return client.caption(picture(colour))

        with ThreadPoolExecutor(len(COLOURS)) as crowd:
            assert dict(zip(COLOURS, crowd.map(asked, COLOURS), strict=True)) == alone
        wait_until(lambda: batches(server)[0] > len(COLOURS), 30, "the metrics to be told")
        assert batches(server)[0] < 2 * len(COLOURS)


def test_what_the_model_refuses_is_told_through_ray(server: Server) -> None:
    order = {"image": base64.b64encode(picture("red")).decode(), "prompt": "<image>"}
    answer = httpx.post(f"{server.url}/v1/captions", json=order, timeout=60)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "prompt"


def test_a_replica_that_dies_is_replaced(server: Server) -> None:
    (pid,) = server.replica_pids("Captions")
    with Client(server.url, busy_s=120) as client:
        before = client.caption(picture("red"))
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(pid), 20, "the replica to end")
        assert client.caption(picture("red")) == before


def test_a_model_that_can_t_work_is_refused_at_the_start(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path / "a-llava")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(AssertionError, match=r"captions\.source: transformers can't make captions with"):
        stop(launch(tmp_path, TANDEM_CAPTIONS__SOURCE=str(folder), TANDEM_DIFFUSION__REPLICAS="0"))
