"""The servers that Tandem is compared with: they draw the stock pipeline's pictures, refuse what they should, end."""

import asyncio
import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import httpx
import numpy as np
import psutil
import pytest
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from loadtest.baselines.common import Drawer, png
from loadtest.baselines.order import Order
from loadtest.family import Family
from loadtest.servers import Budget, Serving, serving
from serve.errors import OperatorError
from serve.models import SHIPPED

CORE = min(os.sched_getaffinity(0))
BUDGET = Budget(cores=(CORE,), torch_threads=1)
SMALL = {"width": 64, "height": 64, "num_inference_steps": 4}
ORDERS: Sequence[dict[str, Any]] = (
    {"prompt": "a red circle", "seed": 1, **SMALL},
    {"prompt": "a large green ring on a white background", "negative_prompt": "blue", "seed": 2**32 - 1, **SMALL},
    {"prompt": "a blue square", "seed": 3, **SMALL, "scheduler": "euler_a", "guidance_scale": 7},
    {"prompt": "two cyan crosses", "seed": 4, "width": 96, "height": 64, "num_inference_steps": 3},
)
"""The first two share a call of a pipeline that batches."""
WRONG: Sequence[tuple[str, dict[str, Any]]] = (
    ("prompt", {"seed": 1}),
    ("prompt", {"prompt": ""}),
    ("width", {"prompt": "a red circle", "width": 65}),
    ("guidance_scale", {"prompt": "a red circle", "guidance_scale": "7"}),
    ("num_inference_steps", {"prompt": "a red circle", "num_inference_steps": 0}),
    ("scheduler", {"prompt": "a red circle", "scheduler": "lms"}),
    ("step", {"prompt": "a red circle", "step": 3}),
)
LINE = ("--max-waiting", "3")
BATCHES = (*LINE, "--batch", "2")
RAY = ("--max-waiting", "8", "--batch", "2")
"""Ray Serve counts an order that it is about to hand to a replica as one that waits."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def stock(index: int) -> NDArray[np.int16]:
    """The picture of an order by diffusers alone."""
    known = {"euler_a": diffusers.EulerAncestralDiscreteScheduler}
    order = dict(ORDERS[index])
    pipeline = StableDiffusionPipeline.from_pretrained(SHIPPED, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if name := order.pop("scheduler", None):
        pipeline.scheduler = known[name].from_config(pipeline.scheduler.config)
    generator = torch.Generator("cpu").manual_seed(order.pop("seed"))
    image = pipeline(**{"guidance_scale": 3.0} | order, generator=generator).images[0]
    return np.asarray(image, dtype=np.int16)


def is_stocks(data: bytes, index: int) -> bool:
    """Within 1/255 in every channel."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        drawn = np.asarray(image, dtype=np.int16)
    return drawn.shape == stock(index).shape and int(np.abs(drawn - stock(index)).max()) <= 1


async def drawn(client: httpx.AsyncClient, dialect: str, order: dict[str, Any]) -> httpx.Response:
    """The picture, or the refusal."""
    answer = await client.post("/generate", json=order)
    if dialect == "generate" or answer.status_code != 202:
        return answer
    while (told := (await client.get(f"/status/{answer.json()['job_id']}")).json())["status"] != "SUCCESS":
        assert told["status"] != "FAILURE", told
    return await client.get(told["result"]["url"])


async def check(server: Serving) -> None:
    """What every baseline does alike, whose line has room for a few."""
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:

        async def all_of(orders: Sequence[dict[str, Any]]) -> list[httpx.Response]:
            return await asyncio.gather(*(drawn(client, server.dialect, order) for order in orders))

        for field, order in WRONG:
            refusal = await client.post("/generate", json=order)
            assert refusal.status_code == 422
            assert field in refusal.text
        for index, answer in enumerate(await all_of(ORDERS)):
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "image/png"
            assert is_stocks(answer.content, index)
        answers = await all_of([ORDERS[0] | {"num_inference_steps": 20}] * 16)
        refused = [answer for answer in answers if answer.status_code == 503]
        assert refused
        assert {answer.status_code for answer in answers} == {200, 503}
        assert is_stocks((await drawn(client, server.dialect, ORDERS[0])).content, 0)


async def whole_life(name: str, options: Sequence[str]) -> None:
    async with serving(name, budget=BUDGET, options=options) as server:
        family = [server.root, *server.root.children(recursive=True)]
        assert {core for process in family for core in process.cpu_affinity()} == {CORE}
        assert server.data_dir.is_dir()
        await check(server)
    assert not any(map(runs, family))
    assert not server.data_dir.exists()


def runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_orders_that_share_a_call_and_orders_that_do_not_have_the_stock_pipeline_s_pictures() -> None:
    drawer = Drawer("shapes", 1)
    for _ in range(2):  # what a call leaves behind is not in the next
        images = drawer.draw([Order.model_validate(order) for order in ORDERS])
        assert [is_stocks(png(image), index) for index, image in enumerate(images)] == [True] * len(ORDERS)


def test_what_is_left_open_has_the_model_s_default_and_a_seed_by_chance() -> None:
    one, other = Drawer("shapes", 1).draw([Order(prompt="a red circle", num_inference_steps=1)] * 2)
    assert one.size == (128, 128)
    assert one.tobytes() != other.tobytes()


def test_a_sampler_s_own_limit_is_the_client_s_mistake() -> None:
    with pytest.raises(ValidationError, match="num_inference_steps: lcm makes at most 50"):
        Order(prompt="a red circle", scheduler="lcm", num_inference_steps=51)


@pytest.mark.slow
def test_one_at_a_time() -> None:
    asyncio.run(whole_life("lock", LINE))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("celery", LINE), ("litserve", BATCHES), ("ray-batch", RAY)])
def test_the_others(name: str, options: Sequence[str]) -> None:
    asyncio.run(whole_life(name, options))


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("gradio", {}, "server 'gradio' is not one of tandem, lock, celery, litserve, ray-batch"),
        ("lock", {"settings": {"http": {}}}, "settings are Tandem's; lock has none"),
        ("tandem", {"options": ["--batch", "2"]}, "options are the baselines'; Tandem has settings"),
        ("lock", {"budget": Budget(cores=(4096,), torch_threads=1)}, "cores: 4096 named"),
        ("lock", {"budget": Budget(cores=(), torch_threads=1)}, "cores: none named"),
        ("lock", {"budget": Budget(cores=(CORE,), torch_threads=0)}, "torch threads: 0 is less than 1"),
    ],
)
def test_what_cannot_be_started_is_said_before_anything_is(name: str, given: dict[str, Any], told: str) -> None:
    async def start() -> None:
        async with serving(name, **{"budget": BUDGET} | given):
            pass

    with pytest.raises(OperatorError) as one:
        asyncio.run(start())
    assert one.value.message.startswith(told)


def test_a_server_that_does_not_start_says_why_and_the_end_of_its_log_is_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def start() -> None:
        async with serving("celery", budget=BUDGET, options=["--colour"]):
            pass

    with caplog.at_level(logging.ERROR), pytest.raises(OperatorError) as one:
        asyncio.run(start())
    assert one.value.message.startswith("celery does not start: exit code 2: ")
    assert one.value.message.endswith("error: unrecognized arguments: --colour")
    assert "usage: celery_stack.py" in caplog.text


HOUSE = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[1] == "stubborn" else signal.SIG_DFL)
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
between = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)"
subprocess.run([sys.executable, "-c", between], check=True)
time.sleep(600)
"""
"""Its grandchild has lost its parent, has a session of its own, and does not hear SIGTERM."""


@pytest.mark.parametrize("kind", ["stubborn", "orderly"])
def test_whoever_belongs_to_a_server_is_ended_with_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtest.family.STOP_S", 0.2)
    command = [sys.executable, "-c", HOUSE, kind]
    family = Family(command, log=tmp_path / "log", environ={**os.environ, "HOUSE": str(tmp_path)}, cores=[CORE])
    members: list[psutil.Process] = []
    with contextlib.suppress(ZeroDivisionError), family:
        while "up" not in (tmp_path / "log").read_text():
            assert family.code is None
        members += of(tmp_path)
        raise ZeroDivisionError
    assert len(members) == 2
    assert not any(map(runs, members))
    assert not of(tmp_path)


def of(house: Path) -> list[psutil.Process]:
    """Alive, with that folder in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if runs(process) and process.environ().get("HOUSE") == str(house):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


GUEST = """
import asyncio, sys
from loadtest.servers import Budget, serving

async def main():
    async with serving("celery", budget=Budget(cores=({core},), torch_threads=1)) as server:
        print(*(process.pid for process in server.root.children(recursive=True)), server.root.pid, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_server_ends_with_the_command_that_started_it(number: signal.Signals, tmp_path: Path) -> None:
    environ = {**os.environ, "TMPDIR": str(tmp_path)}  # who is killed leaves a folder behind
    guest = subprocess.Popen([sys.executable, "-c", GUEST.format(core=CORE)], stdout=subprocess.PIPE, env=environ)
    assert guest.stdout is not None
    family = [psutil.Process(int(pid)) for pid in guest.stdout.readline().split()]
    assert len(family) > 3
    guest.send_signal(number)
    guest.wait(60)
    _, left = psutil.wait_procs(family, timeout=30)
    assert not left
