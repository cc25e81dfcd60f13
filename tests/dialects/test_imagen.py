"""Imagen's dialect as its clients speak it: order, ask again and again, fetch the file."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from PIL import Image
from support.drawing import Drawing

from serve.api.imagen import Status
from serve.callers import Scope

NOBODYS = "0" * 32
Refused = tuple[int, str | None]


@pytest.fixture
def http(drawing: Drawing) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=drawing.url) as client:
        yield client


def statuses(http: httpx.Client, job_id: str) -> Iterator[dict[str, Any]]:
    """One for each event of the job."""
    with http.stream("GET", f"/v1/jobs/{job_id}/events", timeout=60) as events:
        for line in events.iter_lines():
            if line.startswith("data:"):
                yield http.get(f"/status/{job_id}").raise_for_status().json()


def refused(answer: httpx.Response) -> Refused:
    """Status and field of a refusal, which must have this dialect's shape."""
    body = answer.json()
    assert set(body) == {"detail", "param"}, body
    assert isinstance(body["detail"], str)
    assert body["detail"]
    assert answer.headers["x-request-id"]
    return answer.status_code, body["param"]


def test_from_the_order_to_the_file(http: httpx.Client) -> None:
    order = {"prompt": "a red circle on a blue background", "negative_prompt": "blurry", "ip_strength": 0.0}
    answer = http.post("/generate", json=order)
    assert answer.status_code == 200, answer.text
    job_id = answer.json()["job_id"]
    assert answer.json()["status"] == "queued"
    assert re.search(r"Position estimée: [1-9]", answer.json()["message"])
    *before, last = statuses(http, job_id)
    assert last["status"] == "SUCCESS"
    before = [status for status in before if status["status"] != "SUCCESS"]
    assert set(last) == {"job_id", "status", "result"}
    result = last["result"]
    assert result["status"] == "success"
    assert result["url"] == f"/{result['path']}" == f"/outputs/{result['filename']}"
    for status in before:
        assert status["job_id"] == job_id
        meta = status["meta"]
        assert meta["percent"] == 100 * meta["current"] // meta["total"]
        assert ("message" in status) is (status["status"] == "PENDING")
    file = http.get(result["url"])
    assert file.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(file.content)).size == (128, 128)
    request = http.get(f"/v1/jobs/{job_id}").json()["request"]
    assert (request["seed"], request["negative_prompt"]) == (result["seed"], "blurry")


def test_prompts_are_read_as_compel_reads_them(http: httpx.Client) -> None:
    jobs = [
        http.post("/generate", json={"prompt": text}).json()["job_id"] for text in ("a red++ circle", "a red circle")
    ]
    tokens = [http.get(f"/v1/jobs/{job}").json()["tokens"][0]["used"] for job in jobs]
    assert tokens[0] == tokens[1], "++ is a weight, not text"
    assert http.get(f"/v1/jobs/{jobs[0]}").json()["request"]["prompt_weighting"] == "compel"
    for job in jobs:
        http.delete(f"/v1/jobs/{job}")


def test_progress_is_told_while_a_job_runs_and_why_there_is_no_picture(http: httpx.Client) -> None:
    order = {"prompt": "a red circle", "num_inference_steps": 150, "num_images": 4}
    job_id = http.post("/v1/jobs", json=order).json()["id"]
    told = statuses(http, job_id)
    status = next(each for each in told if each["status"] == "PROGRESS" and each["meta"]["current"])
    assert status["meta"]["total"] == 150
    assert 0 < status["meta"]["current"] < 150
    http.delete(f"/v1/jobs/{job_id}")
    *_, last = told
    assert last == {"job_id": job_id, "status": "FAILURE", "error": "the job is cancelled"}


def test_a_file_has_the_one_name_that_its_status_tells(http: httpx.Client) -> None:
    order = {"prompt": "a red circle", "num_inference_steps": 1, "output_format": "jpeg"}
    job_id = http.post("/v1/jobs?wait=true", json=order).json()["id"]
    name = http.get(f"/status/{job_id}").json()["result"]["filename"]
    assert http.get(f"/outputs/{name}").headers["content-type"] == "image/jpeg"
    stem = name.partition(".")[0]
    others = (
        f"{stem}.png",
        stem,
        f"{stem}.jpeg",
        f"{stem}.jpg.png",
        f"{NOBODYS}.jpg",
        "..%2F..%2Fetc%2Fpasswd",
        "%00.png",
    )
    for other in others:
        assert refused(http.get(f"/outputs/{other}"))[0] == 404, other


@pytest.mark.parametrize("path", [f"/status/{NOBODYS}", "/status/7f2b0887-3cdf-46ff-b83b-ff7685ac5b23", "/status/%0a"])
def test_a_job_that_never_was_is_not_found(http: httpx.Client, path: str) -> None:
    assert refused(http.get(path))[0] == 404


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        ('{"prompt": ""}', (422, "prompt")),
        ('{"prompt": " \\n"}', (422, "prompt")),
        ('{"prompt": "a\\u0000b"}', (422, "prompt")),
        ('{"prompt": "\\ud800"}', (422, "prompt")),
        ('{"prompt": 7}', (422, "prompt")),
        ('{"prompt": null}', (422, "prompt")),
        ("{}", (422, "prompt")),
        ('{"prompt": "a", "negative_prompt": ["b"]}', (422, "negative_prompt")),
        ('{"prompt": "a", "ip_strength": 0.65}', (422, "ip_strength")),
        ('{"prompt": "a", "ip_strength": -1}', (422, "ip_strength")),
        ('{"prompt": "a", "ip_strength": NaN}', (422, "ip_strength")),
        ('{"prompt": "a", "ip_strength": true}', (422, "ip_strength")),
        ('{"prompt": "a", "ip_strength": "0"}', (422, "ip_strength")),
        ("[]", (422, "body")),
        ("{", (400, "body")),
    ],
)
def test_what_is_wrong_is_named(http: httpx.Client, content: str, refusal: Refused) -> None:
    assert refused(http.post("/generate", content=content, headers={"content-type": "application/json"})) == refusal


def test_a_prompt_of_a_megabyte_is_refused(http: httpx.Client) -> None:
    assert refused(http.post("/generate", json={"prompt": "a " * 500_000})) == (422, "prompt")


def test_fields_of_others_are_ignored(http: httpx.Client) -> None:
    answer = http.post("/generate?x=1", json={"prompt": "a", "reference_image": "x.png", "ip_strength": 0})
    assert answer.status_code == 200
    http.delete(f"/v1/jobs/{answer.json()['job_id']}")


def test_what_is_no_route_has_the_shape_too(http: httpx.Client) -> None:
    assert refused(http.get("/generate"))[0] == 405
    assert refused(http.get("/status/a/b"))[0] == 404
    assert refused(http.post("/generate", content="prompt=a", headers={"content-type": "text/plain"}))[0] == 415


def test_a_full_queue_and_keys(drawing_with: Callable[..., AbstractContextManager[Drawing]]) -> None:
    with drawing_with(worker=False, jobs={"max_queued": 2}, keys={"required": True}) as server:
        mine = {"authorization": f"Bearer {server.key()}"}
        others = {"authorization": f"Bearer {server.key()}"}
        embeds = {"authorization": f"Bearer {server.key(scopes=[Scope.EMBED])}"}
        order = {"prompt": "a red circle"}
        with httpx.Client(base_url=server.url) as http:
            assert refused(http.post("/generate", json=order)) == (401, None)
            assert refused(http.post("/generate", json=order, headers=embeds)) == (403, None)
            places = [http.post("/generate", json=order, headers=mine) for _ in range(2)]
            assert [place.json()["message"][-1] for place in places] == ["1", "2"]
            full = http.post("/generate", json=order, headers=mine)
            assert refused(full) == (503, None)
            assert "2 jobs are waiting" in full.json()["detail"]
            assert int(full.headers["retry-after"]) > 0
            path = f"/status/{places[1].json()['job_id']}"
            told = Status(**http.get(path, headers=mine).json())
            assert (told.status, told.message) == ("PENDING", places[1].json()["message"])
            assert refused(http.get(path, headers=others))[0] == 404
