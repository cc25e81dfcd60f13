"""Fault 15: the disk that images are kept on is full for a while. It is a small file system of the worker's own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image
from support.chaos import House, until
from support.chaos_collect import collected, puts_of_folder
from support.chaos_report import Verdict
from support.chaos_worker import WorkerPlan

from serve.domain.jobs import JobState

pytestmark = [pytest.mark.anyio, pytest.mark.chaos, pytest.mark.timeout(300)]

MOUNTED = 'mount -t tmpfs -o size=16m tmpfs "$1" && exec "$2" -m support.chaos_worker "$3"'
OWN = ("unshare", "--map-root-user", "--mount")


@contextlib.asynccontextmanager
async def worker_on_a_small_disk(house: House) -> AsyncIterator[Path]:
    """Its images, as its own mounts show them."""
    images = house.folder / "images"
    images.mkdir(exist_ok=True)
    plan = house.folder / "plan.json"
    plan.write_text(json.dumps(asdict(WorkerPlan(name="small", settings=house.tree, folder=str(house.folder)))))
    process = await asyncio.create_subprocess_exec(
        *OWN,
        *("/bin/sh", "-c", MOUNTED, "sh", str(images), sys.executable, str(plan)),
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    try:
        await until((house.folder / "ready-small").exists, 120)
        yield Path(f"/proc/{process.pid}/root{images}")
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 60)


def fill(place: Path) -> None:
    """To the last block."""
    with place.open("wb", buffering=0) as file:
        for piece in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * piece):
                    pass


@pytest.fixture
def mounts() -> None:
    if subprocess.run([*OWN, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system of one's own")


@pytest.mark.usefixtures("mounts")
@pytest.mark.scenario(15, "disk of the images full")
async def test_15_a_full_disk_takes_no_new_work_and_corrupts_none(tmp_path: Path, seed: int, verdict: Verdict) -> None:
    spool = {"spool_bytes": 20_000}
    async with (
        House(tmp_path, seed=seed, workers=0, s3=False, results=spool) as house,
        worker_on_a_small_disk(house) as disk,
    ):
        for job in (f"before-{number}" for number in range(10)):
            await house.order(job)
        await house.ended()
        for _ in range(3):
            fill(disk / "filler")
            jobs = [f"during{len(house.told)}-{number}" for number in range(60)]
            for job in jobs:
                await house.order(job)
            await asyncio.sleep(4)
            states = [(await house.inside.get(job)).state for job in jobs]
            assert JobState.SUCCEEDED not in states
            assert states.count(JobState.QUEUED) >= 10, "a worker that can't store goes on claiming"
            (disk / "filler").unlink()
            await house.ended(60)
        puts = puts_of_folder(disk)
        history = await collected(house.inside, [*house.told, *house.words()], puts)
        left = [str(path) for path in disk.rglob("*.tmp")]
        for put in puts:
            if put.key.endswith(".png"):
                with Image.open(disk / put.key) as image:
                    image.load()
    ends = verdict.of(3, history)
    assert ends == {JobState.SUCCEEDED: 190}
    assert left == []
