"""A server that only encodes text, for three models that share encoders, over HTTP and from the command line."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from safetensors.torch import load
from support.server import Server, launch, stop, wait_until
from support.text_models import flux_folder, sd3_folder, sdxl_folder

pytestmark = pytest.mark.cluster

PROMPT = "a (red:1.3) circle on a blue background"
CLIP, OPENCLIP, T5 = "clip-32x3", "clip-48x2", "t5-96x2"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("text")
    config = home / "tandem.yaml"
    tree = {
        "model": {"source": str(sdxl_folder(home / "sdxl"))},
        "text_models": [{"source": str(sd3_folder(home / "sd3"))}, {"source": str(flux_folder(home / "flux"))}],
        "diffusion": {"replicas": 0},
        "encoders": {T5: {"min_replicas": 0, "idle_s": 600, "lease_s": 5}},
    }
    config.write_text(yaml.safe_dump(tree))
    server = launch(home, TANDEM_CONFIG=str(config))
    yield server
    stop(server)


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def rows(server: Server, encoder: str) -> float:
    """Rows that went through an encoder, as Prometheus would read it from Ray's agent."""
    text = httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10).text
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("ray_tandem_encoder_forward_rows_total") and f'encoder="{encoder}"' in line
    )


def tandem(server: Server, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "serve.cli", *arguments, "--url", server.url],
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_three_models_share_their_encoders(server: Server, http: httpx.Client) -> None:
    """One prompt for SDXL, SD 3 and FLUX: CLIP-L runs once for all, OpenCLIP and T5 once for the two that have them."""

    def t5() -> str:
        return str(http.get("/readyz").json()["pools"][f"text-encoder:{T5}"]["detail"])

    # The ingress may answer before the pool has been tried: one that may sleep is ready either way.
    wait_until(lambda: t5() == "1 awake", 60, "the pool that may sleep to be tried at the start")
    replicas = {name: len(server.replica_pids(f"TextEncoder-{name}")) for name in (CLIP, OPENCLIP, T5)}
    assert replicas == {CLIP: 1, OPENCLIP: 1, T5: 1}, "one pool for each encoder"

    reports = {}
    for model, length in (("sdxl", None), ("sd3", 128), ("flux", 128)):
        order = {"model": model, "prompt": PROMPT, "output": "report", "max_sequence_length": length}
        answer = http.post("/v1/embeddings", json=order)
        assert answer.status_code == 200, answer.text
        reports[model] = answer.json()
    encoded = {model: report["cache"]["encoded"] for model, report in reports.items()}
    # SDXL: a CLIP-L layer, an OpenCLIP layer and its vector. SD 3 finds those, CLIP-L's vector came with them.
    assert encoded == {"sdxl": 3, "sd3": 1, "flux": 0}
    encoders = (CLIP, OPENCLIP, T5)  # each process tells of its own at a time of its own
    wait_until(lambda: all(rows(server, name) >= 1 for name in encoders), 60, "Ray to export the encoders' rows")
    assert {name: rows(server, name) for name in encoders} == {CLIP: 1, OPENCLIP: 1, T5: 1}

    again = http.post("/v1/embeddings", json={"model": "sd3", "prompt": PROMPT, "max_sequence_length": 128})
    other = {"model": "sd3", "prompt": PROMPT.replace("1.3", "0.7"), "max_sequence_length": 128}
    weighed = http.post("/v1/embeddings", json=other)
    assert again.headers["x-tandem-cache"] == weighed.headers["x-tandem-cache"] == "memory=5, redis=0, encoded=0"
    one, two = (load(answer.content)["prompt_embeds"] for answer in (again, weighed))
    assert one.shape == two.shape
    assert not torch.equal(one, two)


def test_what_is_not_served_is_said(http: httpx.Client) -> None:
    models = http.get("/v1/models").json()["data"]
    assert [(model["id"], model["family"], model["images"]) for model in models] == [
        ("sdxl", "sdxl", False),
        ("sd3", "sd3", False),
        ("flux", "flux", False),
    ]
    job = http.post("/v1/jobs", json={"prompt": PROMPT})
    assert job.status_code == 404
    assert "/v1/embeddings" in job.json()["error"]["message"]
    missing = http.post("/v1/embeddings", json={"prompt": PROMPT, "model": "sd15"})
    assert missing.status_code == 404
    assert missing.json()["error"]["param"] == "model"


def test_the_cache_is_shown_warmed_and_cleared(server: Server, http: httpx.Client, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# favourites\na yellow star on a black background\n\na green heart on a white background\n")
    assert "2" in tandem(server, "cache", "warm", str(file), "--model", "sdxl")
    answer = http.post("/v1/embeddings", json={"prompt": "a yellow star on a black background", "output": "report"})
    assert answer.json()["cache"]["encoded"] == 0
    assert "ingress" in tandem(server, "cache", "stats")

    def entries() -> dict[str, int]:
        return {each["name"]: each["entries"] for each in http.get("/v1/cache").json()["processes"]}

    # What processes report is up to two seconds old: what they have must have been told before it can be seen to go.
    wait_until(lambda: entries()[CLIP] and entries()[OPENCLIP], 30, "the pools to report what they keep")
    tandem(server, "cache", "clear", "--yes")
    wait_until(lambda: not any(entries().values()), 30, "every process to empty its memory")
    answer = http.post("/v1/embeddings", json={"prompt": "a yellow star on a black background", "output": "report"})
    assert answer.json()["cache"]["encoded"] == 3
