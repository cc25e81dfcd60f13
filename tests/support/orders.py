"""What the tests over HTTP do with jobs."""

import io

import httpx
import numpy as np
from PIL import Image

STEPS = 20


def submit(http: httpx.Client, prompt: str, **parameters: object) -> str:
    answer = http.post("/v1/jobs", json={"prompt": prompt, "num_inference_steps": STEPS, **parameters})
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    return str(answer.json()["id"])


def finished(http: httpx.Client, job_id: str) -> dict:
    """Follow the job's events to its end."""
    with http.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
        for _ in stream.iter_lines():
            pass
    job: dict = http.get(f"/v1/jobs/{job_id}").json()
    assert job["state"] in ("succeeded", "failed", "cancelled", "expired")
    return job


def picture(http: httpx.Client, job: dict, index: int = 0) -> Image.Image:
    assert job["state"] == "succeeded", job
    answer = http.get(job["images"][index]["url"], follow_redirects=True)
    assert answer.headers["content-type"] == "image/png"
    return Image.open(io.BytesIO(answer.content)).convert("RGB")


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())
