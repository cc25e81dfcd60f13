"""Where a job's time goes, on a whole server: the stages explain what the client waited, and its trace shows them."""

import base64
import concurrent.futures
import io
from typing import Any

import httpx
import pytest
from PIL import Image
from support.collector import Collector
from support.server import wait_until

from serve.domain.jobs import Timings
from serve.stages import explained, stages, wall_s

pytestmark = pytest.mark.cluster

EXPLAINED = 0.97
SHORT_S = 0.1
"""The settlement's round trip, and times that Redis counts in milliseconds, are more than a few percent of less."""


def waited_for(http: httpx.Client, prompt: str, **order: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "num_inference_steps": 20} | order
    answer = http.post("/v1/jobs?wait=true", json=body)
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    assert job["state"] == "succeeded", job
    return job


def check(job: dict[str, Any]) -> Timings:
    timings = Timings(**job["timings"])
    told = dict(stages(timings))
    assert min(told.values()) >= 0, told
    assert timings.admission_s is not None
    share, wall = explained(timings), wall_s(timings)
    assert share is not None
    assert wall is not None
    shown = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in told.items())
    print(f"{100 * share:.1f} % of {1000 * wall:.0f} ms: {shown}")
    assert share <= 1.02, f"more than there was: {told} of {wall}"
    if wall > SHORT_S:
        assert share >= EXPLAINED, f"{share:.3f} of {wall:.3f} s: {told}"
    return timings


def a_png() -> str:
    file = io.BytesIO()
    Image.new("RGB", (128, 128), "green").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_the_stages_explain_what_a_client_waited(http: httpx.Client) -> None:
    fresh = check(waited_for(http, "a purple heart on an orange background"))
    assert fresh.text_s is not None
    assert fresh.batch_images == 1
    known = check(waited_for(http, "a purple heart on an orange background", seed=2))
    assert known.text_from in ("memory", "redis")
    assert (known.input_s, known.source_s, known.retried_s) == (None, None, None)
    source = check(waited_for(http, "a green star", image=a_png(), strength=0.5))
    assert source.input_s is not None
    assert source.source_s is not None
    several = check(waited_for(http, "a red square on a white background", num_images=4))
    assert several.batch_images is not None
    assert 1 < several.batch_images <= 4


def test_beside_others_too(http: httpx.Client) -> None:
    """Who waits for a turn, for the queue, for the VAE is told so."""
    prompts = [f"a {color} {shape}" for color in ("red", "blue", "black") for shape in ("circle", "star", "heart")]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        jobs = list(pool.map(lambda prompt: waited_for(http, prompt, num_inference_steps=40), prompts))
    told = [check(job) for job in jobs]
    assert max(timings.batch_images or 0 for timings in told) > 1


def test_its_trace_shows_the_same(http: httpx.Client, collector: Collector) -> None:
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = http.post(
        "/v1/jobs?wait=true", json={"prompt": "a yellow circle", "num_images": 2}, headers={"traceparent": caller}
    )
    job = answer.json()
    wait_until(
        lambda: {"POST /v1/jobs", "job"} <= {span.name for span in collector.trace_of(job["id"])}, 20, "both spans"
    )
    spans = {span.name: span for span in collector.trace_of(job["id"])}
    order, drawn = spans["POST /v1/jobs"], spans["job"]
    assert order.trace == caller.split("-")[1]
    assert order.parent == caller.split("-")[2]
    assert drawn.parent == order.id
    assert {order.service, drawn.service} == {"tandem-ingress", "tandem-diffusion"}
    for stage, took in stages(Timings(**job["timings"])):
        if stage not in ("admission", "told"):
            assert spans[stage].parent == drawn.id
            assert spans[stage].took_s == pytest.approx(took, abs=1e-5)
    # It was waited for, so that all of the job lies within its order's span, but for its settlement's last words.
    assert order.took_s >= Timings(**job["timings"]).total_s
    assert order.start_s <= drawn.start_s
