"""How orders are taken in: the same order twice, what one would come to, what is refused, whose jobs there are."""

import asyncio
import base64
import io
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.jobs import ANY, until

from serve.callers import Allowance
from serve.embedded import EmbeddedRedis
from serve.jobs.store import Claim, JobStore
from serve.jobs.terms import StepCurve, Submitted, WorkerReport
from serve.settings.front import KeySettings, WebhookSettings

pytestmark = pytest.mark.anyio
ORDER = {"prompt": "a red circle", "num_inference_steps": 2}
JOB_ID = "ab" * 16


def picture(side: int = 64) -> str:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def kept(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in folder.rglob("*.png"))


async def forgotten(stand: Any) -> bool:
    return bool(await stand.jobs.forget(await stand.jobs.overdue()))


def keyed(name: str = "an order") -> dict[str, str]:
    return {"Idempotency-Key": name.replace(" ", "-")}


def unwanted(*_: Any) -> Any:
    raise AssertionError("read")


def a_report(step_ms: float, max_pixels: int = 1 << 20) -> WorkerReport:
    """Of a replica of the shipped model."""
    return WorkerReport(
        name="a worker",
        model="shapes",
        placement="shapes",
        max_pixels=max_pixels,
        max_rows=4,
        batch=2,
        vae_factor=8,
        curves=(StepCurve(height=8, width=8, ms={1: step_ms, 2: step_ms, 4: step_ms}),),
    )


async def test_the_same_order_under_one_key_is_one_job(stand: Any) -> None:
    first = await stand.client.post("/v1/jobs", json=ORDER, headers=keyed())
    assert (first.status_code, "idempotent-replayed" in first.headers) == (202, False)
    job = first.json()
    # A default that is written out is the same order.
    again = await stand.client.post("/v1/jobs", json=ORDER | {"num_images": 1}, headers=keyed())
    assert (again.status_code, again.headers["idempotent-replayed"]) == (202, "true")
    assert again.headers["location"] == first.headers["location"]
    assert again.json() | {"eta_s": 0} == job | {"eta_s": 0}, "with the seed that was drawn then"
    await stand.finish(job["id"])
    ended = (await stand.client.post("/v1/jobs?wait=true", json=ORDER, headers=keyed())).json()
    assert (ended["id"], ended["state"]) == (job["id"], "succeeded"), "as it is now"
    other = await stand.client.post("/v1/jobs", json=ORDER, headers=keyed("another"))
    assert other.json()["id"] != job["id"]
    assert await stand.jobs.queue_depth() == 1


@pytest.mark.parametrize(
    "change", [{"prompt": "a blue circle"}, {"seed": 7}, {"priority": "batch"}, {"num_images": 2}, {"image": picture()}]
)
async def test_another_order_under_the_same_key_is_refused(stand: Any, refused: Any, change: dict[str, Any]) -> None:
    await stand.client.post("/v1/jobs", json=ORDER, headers=keyed())
    answer = await stand.client.post("/v1/jobs", json=ORDER | change, headers=keyed())
    assert refused(answer, 422, "Idempotency-Key")["code"] == "idempotency_conflict"
    await stand.client.put(f"/v1/jobs/{JOB_ID}", json=ORDER)
    refused(await stand.client.put(f"/v1/jobs/{JOB_ID}", json=ORDER | change), 422, "id")
    assert await stand.jobs.queue_depth() == 2


async def test_an_order_under_an_id_of_one_s_own(stand: Any, refused: Any) -> None:
    first = await stand.client.put(f"/v1/jobs/{JOB_ID}", json=ORDER)
    assert (first.status_code, first.json()["id"]) == (202, JOB_ID)
    again = await stand.client.put(f"/v1/jobs/{JOB_ID}", json=ORDER)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (202, "true")
    plain = await stand.create()
    refused(await stand.client.put(f"/v1/jobs/{plain['id']}", json=ORDER), 422, "id")
    for name in ("x", JOB_ID.upper(), JOB_ID + "0"):
        refused(await stand.client.put(f"/v1/jobs/{name}", json=ORDER), 422, "id")


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "ä".encode(), "tab\there", " "])
async def test_a_key_must_be_visible(stand: Any, refused: Any, key: Any) -> None:
    answer = await stand.client.post("/v1/jobs", json=ORDER, headers={"Idempotency-Key": key})
    refused(answer, 422, "Idempotency-Key")
    twice = [("Idempotency-Key", "a"), ("Idempotency-Key", "a")]
    refused(await stand.client.post("/v1/jobs", json=ORDER, headers=twice), 422, "Idempotency-Key")
    long = await stand.client.post("/v1/jobs", json=ORDER, headers={"Idempotency-Key": "x" * 255})
    assert long.status_code == 202


@pytest.mark.parametrize("order", [ORDER, ORDER | {"image": picture(), "strength": 0.5}])
async def test_a_hundred_at_once_are_one_job(stand: Any, tmp_path: Path, order: dict[str, Any]) -> None:
    answers = await asyncio.gather(*(stand.client.post("/v1/jobs", json=order, headers=keyed()) for _ in range(100)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len({str(answer.json()["request"]) for answer in answers}) == 1, "one seed"
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert await stand.jobs.queue_depth() == 1
    assert kept(tmp_path) == (["image"] if "image" in order else [])
    if "image" in order:
        job = answers[0].json()
        assert (await stand.client.get(f"/v1/images/{job['id']}/image")).status_code == 200


async def test_a_replay_stores_no_pictures_and_reads_none(
    stand: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = ORDER | {"image": picture(), "mask": picture()}
    await stand.client.post("/v1/jobs", json=order, headers=keyed())

    def read(*_: Any) -> bytes:
        raise AssertionError("read")

    monkeypatch.setattr("serve.inputs.written_file", read)
    again = await stand.client.post("/v1/jobs", json=order, headers=keyed())
    assert again.headers["idempotent-replayed"] == "true"
    assert kept(tmp_path) == ["image", "mask"]


async def test_an_order_whose_record_is_gone_was_served(
    redis_url: str, tmp_path: Path, stand_on: Any, refused: Any
) -> None:
    async with stand_on(redis_url, tmp_path, jobs={"result_ttl_s": 0.001}) as stand:
        for path, headers, param in (
            ("/v1/jobs", keyed(), "Idempotency-Key"),
            (f"/v1/jobs/{JOB_ID}", {}, "id"),
        ):
            method = "PUT" if param == "id" else "POST"
            job = (await stand.client.request(method, path, json=ORDER, headers=headers)).json()
            await stand.finish(job["id"])
            await until(lambda: forgotten(stand))
            answer = await stand.client.request(method, path, json=ORDER, headers=headers)
            assert refused(answer, 410, param)["code"] == "gone"
            other = await stand.client.request(method, path, json=ORDER | {"seed": 1}, headers=headers)
            refused(other, 422, param)
            refused(await stand.client.get(f"/v1/jobs/{job['id']}"), 404, "id")


class Cut(JobStore):
    """The real store, the answer to whose submission is lost: before it arrived, or after."""

    before = False
    task: asyncio.Task[Any] | None = None

    async def submit(self, *arguments: Any, **options: Any) -> Submitted:
        if self.before:
            await self._run("nowhere")
        submitted = await super().submit(*arguments, **options)
        if self.task is not None:
            self.task.cancel()
            await asyncio.sleep(0)
            return submitted
        from serve.errors import BackendUnavailable

        raise BackendUnavailable("the job store does not answer", "jobs.redis_url", 2.0)


@pytest.mark.parametrize("named", [True, False])
async def test_what_a_lost_answer_leaves(
    stand: Any, tmp_path: Path, refused: Any, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has a key finds the job and its pictures; of who has none the job is taken back."""
    monkeypatch.setattr("serve.submission.ASK_AGAIN_S", 0.01)
    door, store = stand.app.state.service._door, Cut(stand.jobs._settings, stand.metrics)
    real, door.jobs = door.jobs, store
    order, headers = ORDER | {"image": picture()}, keyed() if named else {}
    refused(await stand.client.post("/v1/jobs", json=order, headers=headers), 503, "jobs.redis_url")
    assert await stand.jobs.queue_depth() == 1
    async with asyncio.timeout(10):
        await asyncio.gather(*door.clearing)
    door.jobs = real
    assert await stand.jobs.queue_depth() == named
    if named:
        again = await stand.client.post("/v1/jobs", json=order, headers=headers)
        assert again.headers["idempotent-replayed"] == "true"
        assert kept(tmp_path) == ["image"]
        assert (await stand.client.get(f"/v1/images/{again.json()['id']}/image")).status_code == 200
    await store.close()


async def test_what_was_never_logged_leaves_no_pictures(
    jobs_redis: EmbeddedRedis, tmp_path: Path, stand_on: Any, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.submission.ASK_AGAIN_S", 0.01)
    async with stand_on(jobs_redis.url, tmp_path) as stand:
        door = stand.app.state.service._door
        put = door.inputs._results.put

        async def put_and_stop(*arguments: Any) -> Any:
            stored = await put(*arguments)
            jobs_redis.stop()
            return stored

        monkeypatch.setattr(door.inputs._results, "put", put_and_stop)
        for headers in (keyed(), {}):
            answer = await stand.client.post("/v1/jobs", json=ORDER | {"image": picture()}, headers=headers)
            refused(answer, 503, "jobs.redis_url")
            assert kept(tmp_path) == ["image"]
            jobs_redis.start()
            async with asyncio.timeout(30):
                await asyncio.gather(*door.clearing)
            assert kept(tmp_path) == []


@pytest.mark.parametrize("named", [True, False])
async def test_hanging_up_cancels_what_can_not_be_asked_for_again(stand: Any, tmp_path: Path, named: bool) -> None:
    service = stand.app.state.service
    service._door.jobs = store = Cut(stand.jobs._settings, stand.metrics)
    call = stand.client.post("/v1/jobs", json=ORDER | {"image": picture()}, headers=keyed() if named else {})
    store.task = asyncio.create_task(call)  # cancelled while the job is logged, as Ray Serve does
    with pytest.raises(asyncio.CancelledError):
        await store.task
    assert await stand.jobs.queue_depth() == named
    assert kept(tmp_path) == (["image"] if named else [])
    await store.close()


async def test_a_dry_run_tells_and_leaves_nothing(stand: Any, tmp_path: Path, refused: Any) -> None:
    await stand.jobs.report(a_report(50.0))
    waiting = await stand.create(num_inference_steps=10, width=64, height=64)
    assert waiting["cost_ms"] > 1
    order = ORDER | {"num_inference_steps": 10, "image": picture(), "strength": 1.0}
    answer = await stand.client.post("/v1/jobs?dry_run=true", json=order, headers=keyed())
    told = answer.json()
    assert answer.status_code == 200
    assert told["dry_run"] is True
    assert told["cost_known"] is True
    assert told["cost_ms"] == waiting["cost_ms"]
    assert told["position"] == 2
    assert told["eta_s"] > waiting["cost_ms"] / 1000
    assert told["placements"] == [{"name": "shapes", "gpu_class": None}]
    assert told["would_be_refused"] is None
    assert told["request"]["image"] is None
    assert (told["request"]["width"], told["request"]["model"]) == (64, "shapes")
    assert await stand.jobs.queue_depth() == 1
    assert kept(tmp_path) == []
    broken = base64.b64encode(base64.b64decode(picture())[:-40]).decode()
    refused(await stand.client.post("/v1/jobs?dry_run=1", json=order | {"image": broken}), 422, "image")
    assert (await stand.client.post("/v1/jobs", json=order, headers=keyed())).status_code == 202, "the key is unused"


async def test_a_dry_run_reads_headers_alone(stand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.inputs.image_png", unwanted)
    order = ORDER | {"image": picture()}
    assert (await stand.client.post("/v1/jobs?dry_run=true", json=order)).status_code == 200


async def test_a_dry_run_under_an_id_of_one_s_own_leaves_that_unused(stand: Any, tmp_path: Path) -> None:
    for prompt in ("a red circle", "a blue circle"):
        order = ORDER | {"prompt": prompt, "image": picture()}
        answer = await stand.client.put(f"/v1/jobs/{JOB_ID}?dry_run=true", json=order)
        assert (answer.status_code, answer.json()["dry_run"]) == (200, True)
        assert "location" not in answer.headers
    assert await stand.jobs.queue_depth() == 0
    assert kept(tmp_path) == []
    assert (await stand.client.get(f"/v1/jobs/{JOB_ID}")).status_code == 404
    assert (await stand.client.put(f"/v1/jobs/{JOB_ID}", json=ORDER)).status_code == 202


async def test_a_dry_run_on_a_full_house_says_so(redis_url: str, tmp_path: Path, stand_on: Any) -> None:
    async with stand_on(redis_url, tmp_path, max_queued=1) as stand:
        await stand.create()
        answer = await stand.client.post("/v1/jobs?dry_run=true", json=ORDER)
        assert answer.status_code == 200
        told = answer.json()["would_be_refused"]
        assert told["code"] == "queue_full"
        assert told["retry_after_s"] >= 1


async def test_what_can_never_end_in_time_is_refused(
    redis_url: str, tmp_path: Path, stand_on: Any, refused: Any
) -> None:
    async with stand_on(redis_url, tmp_path, jobs={"timeout_s": 10.0}) as stand:
        assert (await stand.client.post("/v1/jobs", json=ORDER | {"num_inference_steps": 150})).status_code == 202
        await stand.jobs.report(a_report(500.0))
        stand.jobs._heard_at = stand.app.state.service._door.jobs._heard_at = -10.0
        answer = await stand.client.post("/v1/jobs", json=ORDER | {"num_inference_steps": 150})
        assert "jobs.timeout_s" in refused(answer, 422, "num_inference_steps")["message"]
        many = await stand.client.post("/v1/jobs", json=ORDER | {"num_inference_steps": 10, "num_images": 8})
        refused(many, 422, "num_images")
        assert (await stand.client.post("/v1/jobs", json=ORDER)).status_code == 202


async def test_priority_and_webhook_are_part_of_a_job(
    redis_url: str, tmp_path: Path, stand_on: Any, refused: Any
) -> None:
    hooks = WebhookSettings(allowed_hosts=("hooks.example",), secret="whsec_" + base64.b64encode(bytes(32)).decode())
    async with stand_on(redis_url, tmp_path, webhooks=hooks) as stand:
        batch = await stand.create(priority="batch", webhook="https://hooks.example/done")
        assert (batch["priority"], batch["webhook_state"]) == ("batch", None)
        assert batch["eta_s"] >= 0
        first = await stand.create()
        assert (first["priority"], first["position"]) == ("interactive", 1)
        assert (await stand.client.get(f"/v1/jobs/{batch['id']}")).json()["position"] == 2
        await stand.client.delete(f"/v1/jobs/{batch['id']}")
        assert (await stand.client.get(f"/v1/jobs/{batch['id']}")).json()["webhook_state"] == "pending"
        for url in ("https://elsewhere.example/", "http://hooks.example/", "no url"):
            for path in ("/v1/jobs", "/v1/jobs?dry_run=true"):
                refused(await stand.client.post(path, json=ORDER | {"webhook": url}), 422, "webhook")
    async with stand_on(redis_url, tmp_path) as stand:
        answer = await stand.client.post("/v1/jobs", json=ORDER | {"webhook": "https://hooks.example/"})
        refused(answer, 422, "webhook")


async def test_the_own_jobs_newest_first_page_by_page(stand: Any, refused: Any) -> None:
    ids = [(await stand.create())["id"] for _ in range(5)]
    await stand.client.delete(f"/v1/jobs/{ids[1]}")
    seen: list[str] = []
    cursor: str | None = None
    while True:
        query = {"limit": "2"} | ({"cursor": cursor} if cursor else {})
        page = (await stand.client.get("/v1/jobs", params=query)).json()
        assert page["object"] == "list"
        assert len(page["data"]) <= 2
        seen += [job["id"] for job in page["data"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == ids[::-1]
    for states, wanted in ((["cancelled"], [ids[1]]), (["failed"], []), (["queued", "cancelled"], ids[::-1])):
        page = (await stand.client.get("/v1/jobs", params={"state": states})).json()
        assert [job["id"] for job in page["data"]] == wanted
    for query, param in (({"limit": "0"}, "limit"), ({"limit": "101"}, "limit"), ({"state": "x"}, None)):
        answer = await stand.client.get("/v1/jobs", params=query)
        refused(answer, 422, param or answer.json()["error"]["param"])
    refused(await stand.client.get("/v1/jobs", params={"cursor": "x"}), 422, "cursor")


async def test_a_full_house_refuses_at_once(
    redis_url: str, tmp_path: Path, stand_on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P99 under 50 ms, and nothing of the order is read."""
    async with stand_on(redis_url, tmp_path, max_queued=3) as stand:
        for _ in range(3):
            await stand.create()
        door = stand.app.state.service._door

        async def read(*_: Any) -> Any:
            raise AssertionError("read")

        monkeypatch.setattr(door.inputs, "read", read)
        monkeypatch.setattr(JobStore, "submit", read)
        order = {"prompt": "a (red:1.3) circle, " * 100, "image": picture(512)}
        took = []
        for _ in range(300):
            began = time.perf_counter()
            answer = await stand.client.post("/v1/jobs", json=order)
            took.append(time.perf_counter() - began)
            assert answer.status_code == 503
            assert answer.headers["x-should-retry"] == "false"
            assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert sorted(took)[int(0.99 * len(took))] < 0.05


async def test_too_much_work_for_the_model_is_a_full_queue(
    redis_url: str, tmp_path: Path, stand_on: Any, refused: Any
) -> None:
    async with stand_on(redis_url, tmp_path, jobs={"max_queued_s": 2.0}) as stand:
        await stand.jobs.report(a_report(100.0))
        first = await stand.create(num_inference_steps=30)  # an empty queue takes any
        assert first["cost_ms"] > 2000
        answer = await stand.client.post("/v1/jobs", json=ORDER)
        assert refused(answer, 503, answer.json()["error"]["param"])["code"] == "queue_full"
        quoted = (await stand.client.post("/v1/jobs?dry_run=true", json=ORDER)).json()
        assert quoted["would_be_refused"]["code"] == "queue_full"
        claim = await stand.jobs.claim("test", ANY)
        assert isinstance(claim, Claim)
        assert (await stand.client.post("/v1/jobs", json=ORDER)).status_code == 202


async def test_who_is_over_the_own_bounds_is_refused_at_once(
    redis_url: str, tmp_path: Path, stand_on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P99 under 50 ms, and nothing of the order is read."""
    async with stand_on(redis_url, tmp_path, keys=KeySettings(required=True)) as stand:
        headers = await stand.key(allowance=Allowance(max_unfinished=1))
        assert (await stand.client.post("/v1/jobs", json=ORDER, headers=headers)).status_code == 202
        monkeypatch.setattr("serve.inputs.written_file", unwanted)
        order = {"prompt": "a (red:1.3) circle, " * 100, "image": picture(512)}
        took = []
        for _ in range(300):
            began = time.perf_counter()
            answer = await stand.client.post("/v1/jobs", json=order, headers=headers)
            took.append(time.perf_counter() - began)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
        assert sorted(took)[int(0.99 * len(took))] < 0.05
        assert kept(tmp_path) == []


async def test_an_order_that_is_too_dear_is_refused_before_its_pictures_are_decoded(
    redis_url: str, tmp_path: Path, stand_on: Any, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stand_on(redis_url, tmp_path, keys=KeySettings(required=True)) as stand:
        await stand.jobs.report(a_report(50.0))
        headers = await stand.key(allowance=Allowance(engine_s_per_day=1.0))
        order = ORDER | {"num_inference_steps": 24, "width": 64, "height": 64}
        job = (await stand.client.post("/v1/jobs", json=order, headers=headers)).json()
        assert 500 < job["cost_ms"] < 1000, "some is left, but not enough for a second"
        monkeypatch.setattr("serve.inputs.image_png", unwanted)
        for more in ({}, {"image": picture(), "strength": 1.0}):
            answer = await stand.client.post("/v1/jobs", json=order | more, headers=headers)
            assert refused(answer, 429, None)["code"] == "rate_limited"
        assert kept(tmp_path) == []


async def test_the_store_is_asked_before_only_where_there_are_pictures_or_it_refuses(
    redis_url: str, tmp_path: Path, stand_on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    real = JobStore.admit

    async def admit(self: JobStore, model: str, *arguments: Any) -> None:
        looks.append(model)
        await real(self, model, *arguments)

    monkeypatch.setattr(JobStore, "admit", admit)
    async with stand_on(redis_url, tmp_path, max_queued=2) as stand:
        assert (await stand.client.post("/v1/jobs", json=ORDER)).status_code == 202
        assert looks == []
        assert (await stand.client.post("/v1/jobs", json=ORDER | {"image": picture()})).status_code == 202
        assert len(looks) == 2
        looks.clear()
        assert (await stand.client.post("/v1/jobs", json=ORDER)).status_code == 503
        assert looks == []
        monkeypatch.setattr("serve.submission.ASK_FIRST_S", 600.0)
        assert (await stand.client.post("/v1/jobs", json=ORDER)).status_code == 503
        assert len(looks) == 1
        stand.app.state.service._door.refused_at -= 601.0
        assert (await stand.client.post("/v1/jobs", json=ORDER)).status_code == 503
        assert len(looks) == 1


class Abreast(JobStore):
    """The real store, which lets nobody go on before all five have had the same look."""

    looked: asyncio.Barrier

    async def admit(self, *arguments: Any) -> None:
        await super().admit(*arguments)
        await self.looked.wait()


@pytest.mark.parametrize("bound", ["the caller's", "the queue's"])
async def test_of_orders_that_race_for_the_last_place_one_gets_it(
    redis_url: str, tmp_path: Path, stand_on: Any, bound: str
) -> None:
    mine = bound == "the caller's"
    async with stand_on(redis_url, tmp_path, keys=KeySettings(required=True), max_queued=100 if mine else 1) as stand:
        headers = await stand.key(allowance=Allowance(max_unfinished=1 if mine else None))
        door = stand.app.state.service._door
        real, door.jobs = door.jobs, Abreast(stand.jobs._settings, stand.metrics)
        door.jobs.looked = asyncio.Barrier(5)
        order = ORDER | {"image": picture()}
        answers = await asyncio.gather(*(stand.client.post("/v1/jobs", json=order, headers=headers) for _ in range(5)))
        assert sorted(answer.status_code for answer in answers) == [202] + [429 if mine else 503] * 4
        assert kept(tmp_path) == ["image"]
        assert await stand.jobs.queue_depth() == 1
        await door.jobs.close()
        door.jobs = real


class Overtaken(JobStore):
    """The real store; while it is looked whether there is room, the same order is logged by another."""

    other: Any = None

    async def admit(self, *arguments: Any) -> None:
        if self.other is not None:
            other, self.other = self.other, None
            await other()
        await super().admit(*arguments)


async def test_the_same_order_is_not_refused_for_the_place_that_it_has_taken_itself(
    redis_url: str, tmp_path: Path, stand_on: Any
) -> None:
    async with stand_on(redis_url, tmp_path, keys=KeySettings(required=True)) as stand:
        headers = await stand.key(allowance=Allowance(max_unfinished=1)) | keyed()
        door = stand.app.state.service._door
        real, door.jobs = door.jobs, Overtaken(stand.jobs._settings, stand.metrics)
        order = ORDER | {"image": picture()}  # for one without pictures nobody looks
        door.jobs.other = lambda: stand.client.post("/v1/jobs", json=order, headers=headers)
        answer = await stand.client.post("/v1/jobs", json=order, headers=headers)
        assert (answer.status_code, answer.headers.get("idempotent-replayed")) == (202, "true")
        assert "r=0" in answer.headers["ratelimit"]
        await door.jobs.close()
        door.jobs = real


async def test_the_same_key_again_after_its_time_is_a_new_job_under_a_new_id(
    redis_url: str, tmp_path: Path, stand_on: Any
) -> None:
    async with stand_on(redis_url, tmp_path, jobs={"idempotency_ttl_s": 0.001}) as stand:
        ids = []
        for _ in range(2):
            ids.append((await stand.client.post("/v1/jobs", json=ORDER, headers=keyed())).json()["id"])
            while await stand.jobs._redis.keys("tandem:order:*"):
                pass
        assert ids[0] != ids[1]
