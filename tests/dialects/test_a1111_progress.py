"""What a client of the A1111 dialect has under way: how far it is, and its end before the time. Jobs move by hand."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image
from support.a1111 import Replica, api_of, beside, pixels, until
from support.drawing import Drawing, drawing_server

from serve.domain.jobs import JobState
from serve.settings.front import KeySettings

SMALL = {"prompt": "a red circle", "seed": 7, "steps": 4, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def server(drawing_with: Any) -> Iterator[Drawing]:
    with drawing_with(worker=False, keys=KeySettings(required=True)) as drawing:
        yield drawing


@pytest.fixture(scope="module")
def replica(server: Drawing) -> Replica:
    return Replica(server)


@pytest.fixture
def key(server: Drawing) -> str:
    return server.key()


@pytest.fixture
def api(server: Drawing, key: str) -> Any:
    return api_of(server, key)


def of_task(server: Drawing, key: str, task: str, **more: Any) -> dict[str, Any]:
    order = {"id_task": task} | more
    answer = httpx.post(f"{server.url}/internal/progress", json=order, headers={"x-api-key": key})
    told: dict[str, Any] = answer.raise_for_status().json()
    return told


def begun(api: Any, jobs: int = 1) -> dict[str, Any]:
    """The progress once so many jobs are there."""
    told: dict[str, Any] = until(lambda: (seen := api.get_progress())["state"]["job_count"] >= jobs and seen)
    return told


def test_progress_rises_with_the_steps(server: Drawing, replica: Replica, api: Any) -> None:
    assert api.get_progress()["progress"] == 0
    call = beside(api.txt2img, **SMALL, n_iter=2)
    waiting = begun(api, 2)
    assert waiting["progress"] == 0
    assert waiting["state"]["job_count"] == 2
    first, second = replica.claim(), replica.claim()
    replica.step(first, 2)
    told = until(lambda: (seen := api.get_progress())["progress"] > 0 and seen)
    assert told["progress"] == pytest.approx(0.25)
    assert (told["state"]["sampling_step"], told["state"]["sampling_steps"], told["state"]["job_no"]) == (2, 4, 0)
    assert told["current_image"] is None
    replica.show(first, 2, b"\xff\xd8 a small picture")
    assert base64.b64decode(api.get_progress()["current_image"]) == b"\xff\xd8 a small picture"
    unseen = f"{server.url}/sdapi/v1/progress?skip_current_image=true"
    assert httpx.get(unseen, auth=api.session.auth).json()["current_image"] is None
    replica.finish(first)
    told = until(lambda: (seen := api.get_progress())["state"]["job_no"] == 1 and seen)
    assert told["progress"] == pytest.approx(0.5)
    assert not call.done()
    replica.finish(second)
    assert len(call.result(30).images) == 2
    assert api.get_progress()["progress"] == 0
    api.util_wait_for_ready()


def test_a_picture_that_is_drawn_shows_itself_and_stops(drawing: Drawing) -> None:
    """By a real worker."""
    api = api_of(drawing)
    long = SMALL | {"steps": 150, "width": 128, "height": 128}
    call = beside(api.txt2img, **long, override_settings={"show_progress_every_n_steps": 2})
    shown = until(lambda: (seen := api.get_progress())["current_image"] and seen)
    assert Image.open(io.BytesIO(base64.b64decode(shown["current_image"]))).size == (64, 64)  # a pixel for each latent
    assert 0 < until(lambda: api.get_progress()["progress"]) < 1
    api.interrupt()
    assert call.result(30).images == []


def test_each_task_has_its_own_progress(server: Drawing, replica: Replica, api: Any, key: str) -> None:
    order = {"url": f"{server.url}/sdapi/v1/txt2img", "headers": {"x-api-key": key}, "timeout": 60}
    call = beside(httpx.post, json=SMALL | {"force_task_id": "task(a b:*/\u2603)"}, **order)
    told = until(lambda: (seen := of_task(server, key, "task(a b:*/\u2603)"))["queued"] and seen["textinfo"] and seen)
    assert (told["active"], told["completed"], told["textinfo"]) == (False, False, "In queue: 1")
    claim = replica.claim()
    replica.step(claim, 1)
    replica.show(claim, 1, b"one")
    told = until(lambda: (seen := of_task(server, key, "task(a b:*/\u2603)"))["active"] and seen)
    assert told["progress"] == pytest.approx(0.25)
    assert told["live_preview"] == "data:image/jpeg;base64," + base64.b64encode(b"one").decode()
    again = of_task(server, key, "task(a b:*/\u2603)", id_live_preview=told["id_live_preview"])
    assert (again["live_preview"], again["id_live_preview"]) == (None, told["id_live_preview"])
    assert of_task(server, key, "task(a b:*/\u2603)", live_preview=False)["live_preview"] is None
    replica.show(claim, 2, b"two")
    later = of_task(server, key, "task(a b:*/\u2603)", id_live_preview=told["id_live_preview"])
    assert later["live_preview"]
    assert later["id_live_preview"] > told["id_live_preview"]
    replica.finish(claim)
    assert call.result(30).status_code == 200
    assert of_task(server, key, "task(a b:*/\u2603)")["completed"]
    other = of_task(server, key, "another")
    assert not (other["active"])
    assert not (other["queued"])
    assert not (other["completed"])


def test_what_a_key_has_under_way_is_its_own(server: Drawing, replica: Replica, api: Any, key: str) -> None:
    call = beside(api.txt2img, **SMALL)
    task = begun(api)["current_task"]
    stranger = server.key()
    assert api_of(server, stranger).get_progress()["state"]["job_count"] == 0
    assert not of_task(server, stranger, task)["queued"]
    assert api_of(server, stranger).interrupt() == {}
    replica.finish(replica.claim())
    assert len(call.result(30).images) == 1


def test_interrupted_a_call_answers_with_what_is_finished(replica: Replica, api: Any) -> None:
    call = beside(api.txt2img, **SMALL, n_iter=3)
    begun(api, 3)
    first, second = replica.claim(), replica.claim()
    replica.finish(first)
    assert api.interrupt() == {}
    assert api.get_progress()["state"]["interrupted"]
    assert replica.let_go(second) is JobState.CANCELLED
    answer = call.result(30)
    assert answer.info["all_seeds"] == [7, 8, 9]
    assert len(answer.images) == len(answer.info["infotexts"]) == 1
    assert (pixels(answer.image) == 128).all()
    assert api.interrupt() == {}  # nothing is left to be ended


def test_interrupted_before_anything_is_finished_it_has_no_pictures(api: Any) -> None:
    call = beside(api.txt2img, **SMALL)
    begun(api)
    api.interrupt()
    assert call.result(30).images == []


def test_skipping_leaves_one_picture_out(replica: Replica, api: Any) -> None:
    call = beside(api.txt2img, **SMALL, n_iter=2)
    begun(api, 2)
    first = replica.claim()
    assert api.skip() == {}
    assert api.get_progress()["state"]["skipped"]
    assert replica.let_go(first) is JobState.CANCELLED
    second = replica.claim()
    assert second.request.seed == 8
    replica.finish(second)
    answer = call.result(30)
    assert len(answer.images) == 1
    assert "Seed: 8" in answer.info["infotexts"][0]


def test_any_replica_of_the_server_finds_what_is_under_way(server: Drawing, api: Any, key: str) -> None:
    url = server.jobs._settings.redis_url
    assert url is not None
    with drawing_server(url.get_secret_value(), worker=False, keys=KeySettings(required=True)) as beside_it:
        call = beside(api.txt2img, **SMALL)
        other = api_of(beside_it, key)
        task = begun(other)["current_task"]
        assert of_task(beside_it, key, task)["queued"]
        other.interrupt()
        assert call.result(30).images == []
        assert of_task(server, key, task)["completed"]


def test_who_hangs_up_cancels_all_of_it(server: Drawing, api: Any, key: str) -> None:
    client = httpx.Client(base_url=server.url, headers={"x-api-key": key})
    with pytest.raises(httpx.ReadTimeout):
        client.post("/sdapi/v1/txt2img", json=SMALL | {"n_iter": 2}, timeout=httpx.Timeout(10, read=0.2))
    until(lambda: [job["state"] for job in client.get("/v1/jobs").json()["data"]] == ["cancelled"] * 2)
    assert api.get_progress()["state"]["job_count"] == 0


def test_a_call_fails_with_its_job(server: Drawing, replica: Replica, api: Any) -> None:
    call = beside(api.txt2img, **SMALL, n_iter=2)
    begun(api, 2)
    claim = replica.claim()
    server.run(replica.fail(claim))
    failure = call.exception(30)
    assert isinstance(failure, RuntimeError)
    assert failure.args[0] == 500
    assert "it broke" in failure.args[1]
    assert api.get_progress()["state"]["job_count"] == 0
    client = httpx.Client(base_url=server.url, auth=api.session.auth)
    until(lambda: [job["state"] for job in client.get("/v1/jobs").json()["data"]] == ["cancelled", "failed"])


def test_the_store_is_sound_after_all_that(server: Drawing) -> None:
    server.run(server.jobs.check_integrity())
