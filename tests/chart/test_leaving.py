"""What a worker's pod does before it ends, as the chart has it, on a real node: it drains itself, and no other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.chart import CI, render

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NODE = """
import os, subprocess, sys, tempfile
import ray
from support.server import wait_until

command = sys.argv[1:]
with tempfile.TemporaryDirectory(prefix="tandem-") as folder:  # short: Ray keeps Unix sockets in it
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=80 * 1024 * 1024,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    context = ray.get_runtime_context()
    subprocess.run(command, env={**os.environ, "RAY_ADDRESS": context.gcs_address}, check=True, timeout=60)
    wait_until(lambda: not any(each["Alive"] for each in ray.nodes()), 60, "the node to end")
    print("gone")
"""
"""In a process of its own, which may end with its node. The variable names the head; Ray itself finds which node it is
on."""


def test_a_worker_drains_the_node_that_it_is_on() -> None:
    (container, *_) = render(CI[0]).cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    shell, option, script = container["lifecycle"]["preStop"]["exec"]["command"]
    drain, _, rest = script.rpartition("&&")
    assert re.fullmatch(r"\s*sleep \d+\s*", rest), "then it waits until its raylet has ended"
    paths = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    process = (sys.executable, "-c", NODE, shell, option, drain)
    ended = subprocess.run(process, env={**os.environ, **paths}, capture_output=True, text=True, timeout=180)
    assert ended.stdout.split()[-1:] == ["gone"], ended.stderr[-2000:]
