"""Jobs and images over HTTP; the test plays the worker."""

import asyncio
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from serve.embedded import EmbeddedRedis
from serve.readiness import PoolState
from serve.settings.stores import ResultSettings, S3Settings

pytestmark = pytest.mark.anyio
PNG = b"\x89PNG not really"
NOBODY = "0" * 32


async def test_a_job_is_created_with_every_default_filled_in(stand: Any) -> None:
    answer = await stand.client.post("/v1/jobs", json={"prompt": "a red circle", "seed": 7})
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["state"], job["position"], job["step"], job["steps"]) == ("queued", 1, 0, 20)
    assert job["request"]["seed"] == 7
    assert job["request"]["model"] == "shapes"
    assert job["images"] == job["truncated"] == []
    again = await stand.client.get(answer.headers["location"])
    assert again.status_code == 200
    assert again.json() == job


async def test_a_job_says_what_was_cut_from_its_prompt(stand: Any) -> None:
    job = await stand.create(prompt="a red circle, " * 40, long_prompt="head")
    assert job["truncated"][0]["field"] == "prompt"
    assert job["truncated"][0]["tokens"] > job["truncated"][0]["limit"]


async def test_a_finished_job_and_its_image(stand: Any) -> None:
    job = await stand.create(num_inference_steps=2)
    await stand.finish(job["id"])
    done = (await stand.client.get(f"/v1/jobs/{job['id']}")).json()
    assert (done["state"], done["step"], done["error"]) == ("succeeded", 2, None)
    assert done["timings"]["total_s"] >= 0
    image = await stand.client.get(done["images"][0]["url"])
    assert (image.status_code, image.content, image.headers["content-type"]) == (200, PNG, "image/png")
    assert image.headers["cache-control"] == "private, no-cache", "an id of the client's own may be used again"
    for tag in (image.headers["etag"], f'"other", W/{image.headers["etag"]}', "*"):
        known = await stand.client.get(done["images"][0]["url"], headers={"if-none-match": tag})
        assert (known.status_code, known.content) == (304, b"")
    changed = await stand.client.get(done["images"][0]["url"], headers={"if-none-match": '"other"'})
    assert changed.status_code == 200


async def test_an_image_that_is_not_there(stand: Any, refused: Any) -> None:
    job = await stand.create()
    refused(await stand.client.get(f"/v1/images/{job['id']}/0"), 404, "index")
    await stand.finish(job["id"])
    for index in ("1", "-1", "x", "1.0", "99999"):
        refused(await stand.client.get(f"/v1/images/{job['id']}/{index}"), 404, "index")


@pytest.fixture
def s3(s3_endpoint: str) -> S3Settings:
    keys = {"access_key_id": "k", "secret_access_key": "s"}
    boto3.client(
        "s3", endpoint_url=s3_endpoint, region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s"
    ).create_bucket(Bucket="api")
    return S3Settings(bucket="api", endpoint_url=s3_endpoint, region="us-east-1", **keys)


async def test_an_image_in_s3_is_a_redirect_to_a_url_that_works(
    redis_url: str, tmp_path: Path, s3: S3Settings, stand_on: Any
) -> None:
    async with stand_on(redis_url, tmp_path, results=ResultSettings(store="s3", s3=s3)) as stand:
        job = await stand.create()
        await stand.finish(job["id"])
        answer = await stand.client.get(f"/v1/images/{job['id']}/0")
        assert answer.status_code == 307
        async with httpx.AsyncClient() as outside:
            assert (await outside.get(answer.headers["location"])).content == PNG


async def test_an_image_in_a_bucket_that_clients_cannot_reach_is_handed_out(
    redis_url: str, tmp_path: Path, s3: S3Settings, stand_on: Any
) -> None:
    results = ResultSettings(store="s3", s3=s3.model_copy(update={"presign": False}))
    async with stand_on(redis_url, tmp_path, results=results) as stand:
        job = await stand.create()
        await stand.finish(job["id"])
        answer = await stand.client.get(f"/v1/images/{job['id']}/0")
        assert (answer.status_code, answer.headers["content-type"], answer.content) == (200, "image/png", PNG)


async def test_cancelling(stand: Any) -> None:
    first, second = await stand.create(), await stand.create()
    gone = await stand.client.delete(f"/v1/jobs/{first['id']}")
    assert (gone.status_code, gone.json()["state"]) == (200, "cancelled")
    assert (await stand.client.get(f"/v1/jobs/{second['id']}")).json()["position"] == 1
    await stand.finish(second["id"])
    assert (await stand.client.delete(f"/v1/jobs/{second['id']}")).json()["state"] == "succeeded"


@pytest.mark.parametrize("job_id", [NOBODY, "x", "0" * 33, "A" * 32, "..%2f..%2fetc", "0" * 31 + "%0a", "٠" * 32])
async def test_a_job_that_is_not_there(stand: Any, job_id: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
        answer = await stand.client.request(method, f"/v1/jobs/{job_id}{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert (await stand.client.get(f"/v1/images/{job_id}/0")).status_code == 404


async def test_a_full_queue_says_when_to_come_back_and_that_retrying_now_is_no_use(
    redis_url: str, tmp_path: Path, stand_on: Any, refused: Any
) -> None:
    async with stand_on(redis_url, tmp_path, max_queued=1) as stand:
        await stand.create()
        answer = await stand.client.post("/v1/jobs", json={"prompt": "one more"})
        assert refused(answer, 503, answer.json()["error"]["param"])["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["x-should-retry"] == "false"


async def test_without_redis_every_job_route_is_a_503_and_the_process_is_alive(
    jobs_redis: EmbeddedRedis, tmp_path: Path, stand_on: Any, refused: Any
) -> None:
    async with stand_on(jobs_redis.url, tmp_path) as stand:
        job = await stand.create()
        jobs_redis.stop()
        path = f"/v1/jobs/{job['id']}"
        for method, route in (("GET", path), ("DELETE", path), ("GET", f"{path}/events"), ("POST", "/v1/jobs")):
            answer = await stand.client.request(method, route, json={"prompt": "a"} if method == "POST" else None)
            error = refused(answer, 503, "jobs.redis_url")
            assert "redis://" not in error["message"]
            assert int(answer.headers["retry-after"]) >= 1
        assert (await stand.client.get("/healthz")).json()["status"] == "ok"


async def test_ready_is_when_every_pool_is(stand: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.readiness.READY_S", 0.0)
    ready = await stand.client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["pools"]["diffusion"] == {"ready": True, "detail": "1 replica"}
    stand.pools["diffusion"] = PoolState(False, "loading")
    answer = await stand.client.get("/readyz")
    assert "diffusion" in refused(answer, 503, None)["message"]
    assert answer.json()["ready"] is False
    assert answer.json()["pools"]["text_encoder"]["ready"] is True


async def test_however_many_want_to_know_the_pools_are_asked_once_in_a_while(
    stand: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.readiness.READY_S", 3600.0)
    asked, begun, go_on = 0, asyncio.Event(), asyncio.Event()

    async def slow() -> PoolState:
        nonlocal asked
        asked += 1
        begun.set()
        await go_on.wait()
        return PoolState(True, "up")

    service = stand.app.state.service
    service._readiness._pools["slow"] = slow
    asking = [asyncio.create_task(stand.client.get("/readyz")) for _ in range(50)]
    gone = asyncio.create_task(service.readiness())
    await begun.wait()
    gone.cancel()  # which is nobody else's loss
    with pytest.raises(asyncio.CancelledError):
        await gone
    go_on.set()
    assert {answer.status_code for answer in await asyncio.gather(*asking)} == {200}
    assert ((await stand.client.get("/readyz")).status_code, asked) == (200, 1)
    monkeypatch.setattr("serve.readiness.READY_S", 0.0)
    assert ((await stand.client.get("/readyz")).status_code, asked) == (200, 2)


async def test_models(stand: Any) -> None:
    listed = (await stand.client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["shapes"]
    model = listed["data"][0]
    assert model["default_width"] % model["size_multiple"] == 0
    assert model["tasks"] == ["txt2img", "img2img", "inpaint"]
    assert {"euler_a", "dpmpp_2m_karras"} <= set(model["schedulers"])
    assert model["aspect_ratios"]["1:1"] == [model["default_width"], model["default_height"]]
    for ratio, size in model["aspect_ratios"].items():
        order = (await stand.create(aspect_ratio=ratio))["request"]
        assert [order["width"], order["height"]] == size
