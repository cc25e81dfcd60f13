"""`loadtest.servers`: Tandem as the compared one, on its budget, with the baselines' pictures."""

import asyncio
import io
import os
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from loadtest.baselines.common import Drawer
from loadtest.baselines.order import Order
from loadtest.servers import Budget, serving

CORE = max(os.sched_getaffinity(0))
SMALL = {"width": 64, "height": 64, "num_inference_steps": 4}
ORDERS: tuple[dict[str, Any], ...] = (
    {"prompt": "a red circle", "seed": 1, **SMALL},
    {"prompt": "a large green ring on a white background", "negative_prompt": "blue", "seed": 2**32 - 1, **SMALL},
    {"prompt": "a blue square", "seed": 3, **SMALL, "scheduler": "euler_a", "guidance_scale": 7},
    {"prompt": "two cyan crosses", "seed": 4},
)


def pixels(image: Image.Image) -> Any:
    return np.asarray(image, dtype=np.int16)


async def drawn(client: httpx.AsyncClient, order: dict[str, Any]) -> Any:
    job = (await client.post("/v1/jobs", params={"wait": "true"}, json=order)).raise_for_status().json()
    assert job["state"] == "succeeded", job
    data = (await client.get(job["images"][0]["url"])).raise_for_status().content
    with Image.open(io.BytesIO(data)) as image:
        return pixels(image)


async def life(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TANDEM_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("TANDEM_LIMITS__MAX_SIDE", "64")
    budget = Budget(cores=(CORE,), torch_threads=1)
    async with serving("tandem", budget=budget, settings={"limits": {"max_num_images": 2}}) as server:
        family = [server.root, *server.root.children(recursive=True)]
        assert {core for process in family for core in process.cpu_affinity()} == {CORE}
        assert server.dialect == "wait"
        assert server.metrics_url is not None
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            images = await asyncio.gather(*(drawn(client, order) for order in ORDERS))
            assert (await client.post("/v1/jobs", json=ORDERS[0] | {"num_images": 3})).status_code == 422
            assert "tandem_" in (await client.get(server.metrics_url)).text
        assert (server.data_dir / "images").is_dir()
    assert not any(runs(process) for process in family)
    assert not server.data_dir.exists()
    stock = Drawer("shapes", 1).draw([Order.model_validate(order) for order in ORDERS])
    for ours, theirs in zip(images, stock, strict=True):
        assert ours.shape == pixels(theirs).shape
        assert int(np.abs(ours - pixels(theirs)).max()) <= 1


def runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_tandem_on_a_budget_draws_the_baselines_pictures_and_hears_no_operator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asyncio.run(life(monkeypatch, tmp_path))
    assert not any(tmp_path.iterdir())
