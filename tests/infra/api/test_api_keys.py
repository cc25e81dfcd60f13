"""API keys at the door: who passes, with which scope, and whose jobs are whose."""

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from serve.callers import Allowance, Scope
from serve.embedded import EmbeddedRedis
from serve.settings.front import KeySettings
from serve.settings.stores import CacheSettings

pytestmark = pytest.mark.anyio
ORDER = {"prompt": "a red circle", "num_inference_steps": 2}
KEYS = KeySettings(required=True)
NOBODY = "0" * 32
GENERATE, EMBED, ADMIN = ({scope} for scope in (Scope.GENERATE, Scope.EMBED, Scope.ADMIN))
EITHER = GENERATE | EMBED
ROUTES = [
    ("POST", "/v1/jobs", GENERATE),
    ("PUT", f"/v1/jobs/{NOBODY}", GENERATE),
    ("GET", "/v1/jobs", GENERATE),
    ("GET", f"/v1/jobs/{NOBODY}", GENERATE),
    ("GET", f"/v1/jobs/{NOBODY}/events", GENERATE),
    ("DELETE", f"/v1/jobs/{NOBODY}", GENERATE),
    ("GET", f"/v1/images/{NOBODY}/0", GENERATE),
    ("POST", "/v1/images/generations", GENERATE),
    ("POST", "/v1/images/edits", GENERATE),
    ("POST", "/v1/images/variations", GENERATE),
    ("GET", "/v1/models", EITHER),
    ("GET", f"/v1/models/{NOBODY}", EITHER),
    ("GET", "/v1/fleet", EITHER),
    ("GET", "/v1/limits", EITHER),
    ("POST", "/v1/captions", EITHER),
    ("POST", "/v1/embeddings", EMBED),
    ("POST", "/v1/prompts/analyze", EMBED),
    ("POST", "/v1/prompts/similarity", EMBED),
    ("GET", "/v1/cache", ADMIN),
    ("DELETE", "/v1/cache", ADMIN),
    ("POST", "/v1/benchmark", ADMIN),
]


@pytest.fixture
async def keyed(redis_url: str, tmp_path: Path, stand_on: Any) -> AsyncIterator[Any]:
    async with stand_on(redis_url, tmp_path, keys=KEYS) as stand:
        yield stand


def body_of(method: str, path: str) -> dict[str, str] | None:
    """An order that is queued, or else refused at once: OpenAI's calls answer when the picture is there."""
    prompt = "" if path.startswith("/v1/images") else "a"
    return {"prompt": prompt} if method in ("POST", "PUT") else None


async def test_the_table_of_scopes_has_every_route(stand: Any) -> None:
    schema = (await stand.client.get("/openapi.json")).json()
    known = {(method.upper(), path) for path, methods in schema["paths"].items() for method in methods}
    named = {(method, path.replace(NOBODY, "{id}").replace("/0", "/{index}")) for method, path, _ in ROUTES}
    assert {each for each in known if each[1].startswith("/v1")} == named


@pytest.mark.parametrize(("method", "path", "scopes"), ROUTES)
async def test_every_route_wants_a_key_with_its_scope(
    keyed: Any, refused: Any, method: str, path: str, scopes: set[Scope]
) -> None:
    answer = await keyed.client.request(method, path, json=body_of(method, path))
    assert refused(answer, 401, None)["code"] == "unauthorized"
    assert answer.headers["www-authenticate"] == "Bearer"
    lacking = await keyed.key(scopes=set(Scope) - scopes)
    answer = await keyed.client.request(method, path, json=body_of(method, path), headers=lacking)
    error = refused(answer, 403, None)
    assert error["code"] == "forbidden"
    assert all(scope in error["message"] for scope in scopes)
    for scope in scopes:  # any of them will do
        headers = await keyed.key(scopes={scope})
        allowed = await keyed.client.request(method, path, json=body_of(method, path), headers=headers)
        assert allowed.status_code not in (401, 403)
        assert allowed.status_code < 500 or path == "/v1/cache"  # which needs a Redis of its own


async def test_probes_and_the_page_are_open(keyed: Any) -> None:
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert (await keyed.client.get(path)).status_code == 200
    assert (await keyed.client.get("/v1/nothing")).status_code == 401
    assert (await keyed.client.get("/nothing")).status_code == 404


async def test_a_key_comes_in_three_ways(keyed: Any) -> None:
    secret = (await keyed.key())["authorization"].removeprefix("Bearer ")
    basic = base64.b64encode(f"anybody:{secret}".encode()).decode()
    for headers in (
        {"authorization": f"Bearer {secret}"},
        {"authorization": f"bearer  {secret} "},
        {"x-api-key": secret},
        {"authorization": f"Basic {basic}"},
        {"authorization": "Bearer another", "x-api-key": secret},
    ):
        assert (await keyed.client.get("/v1/models", headers=headers)).status_code == 200, headers


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer"},
        {"authorization": "Bearer  "},
        {"authorization": "Basic !!!"},
        {"authorization": f"Basic {base64.b64encode(bytes([255, 254])).decode()}"},
        {"authorization": f"Basic {base64.b64encode(b'no colon').decode()}"},
        {"authorization": f"Basic {base64.b64encode(b'user:').decode()}"},
        {"authorization": "Digest x"},
        {"authorization": "Bearer tdm_aaaaaaaaaaaa_" + "A" * 43},
        {"authorization": b"Bearer \xff\xfe"},
        {"x-api-key": "x" * 5000},
        {"x-api-key": "* "},
    ],
)
async def test_what_is_no_key_opens_nothing(keyed: Any, refused: Any, headers: dict[str, Any]) -> None:
    await keyed.key()
    refused(await keyed.client.get("/v1/models", headers=headers), 401, None)


async def test_an_unknown_caller_s_body_is_not_read(keyed: Any, refused: Any) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("read")
        yield b""

    refused(await keyed.client.post("/v1/jobs", content=body()), 401, None)


async def test_under_a_mount_the_door_is_the_same(keyed: Any, refused: Any) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("read")
        yield b""

    keyed.app.root_path = "/tandem"
    for path in ("/v1/jobs", "/tandem/v1/jobs"):
        refused(await keyed.client.post(path, content=body()), 401, None)


async def test_a_job_is_its_owner_s_alone(keyed: Any, refused: Any) -> None:
    mine, theirs = await keyed.key(), await keyed.key()
    job = (await keyed.client.post("/v1/jobs", json=ORDER, headers=mine)).json()
    await keyed.finish(job["id"])
    paths = [
        ("GET", f"/v1/jobs/{job['id']}"),
        ("GET", f"/v1/jobs/{job['id']}/events"),
        ("DELETE", f"/v1/jobs/{job['id']}"),
        ("GET", f"/v1/images/{job['id']}/0"),
    ]
    for method, path in paths:
        told = refused(await keyed.client.request(method, path, headers=theirs), 404, "id")
        never = await keyed.client.request(method, path.replace(job["id"], NOBODY), headers=theirs)
        assert told == refused(never, 404, "id"), "as of one that never was"
    for method, path in paths:
        assert (await keyed.client.request(method, path, headers=mine)).status_code == 200
    order = ORDER | {"image": f"{job['id']}/0"}
    told = refused(await keyed.client.post("/v1/jobs", json=order, headers=theirs), 404, "image")
    order["image"] = f"{NOBODY}/0"
    assert told == refused(await keyed.client.post("/v1/jobs", json=order, headers=theirs), 404, "image")
    listed = [(await keyed.client.get("/v1/jobs", headers=each)).json()["data"] for each in (mine, theirs)]
    assert [len(each) for each in listed] == [1, 0]


async def test_an_id_that_is_another_s_can_not_be_taken(keyed: Any, refused: Any) -> None:
    mine, theirs = await keyed.key(), await keyed.key()
    job_id = "ab" * 16
    assert (await keyed.client.put(f"/v1/jobs/{job_id}", json=ORDER, headers=mine)).status_code == 202
    refused(await keyed.client.put(f"/v1/jobs/{job_id}", json=ORDER, headers=theirs), 404, "id")
    same = {"idempotency-key": "one"}
    ids = {
        (await keyed.client.post("/v1/jobs", json=ORDER, headers=each | same)).json()["id"] for each in (mine, theirs)
    }
    assert len(ids) == 2, "each owner has the own Idempotency-Keys"


async def test_keys_share_the_cache_unless_they_are_salted(redis_url: str, tmp_path: Path, stand_on: Any) -> None:
    async def tiers(settings: KeySettings) -> list[str]:
        cache = CacheSettings(memory_bytes=1 << 24)
        async with stand_on(redis_url, tmp_path, keys=settings, cache=cache) as stand:
            answers = [
                await stand.client.post("/v1/embeddings", json={"prompt": "a star"}, headers=await stand.key())
                for _ in range(2)
            ]
            return [answer.headers["x-tandem-cache"] for answer in answers]

    first, second = await tiers(KEYS)
    assert "encoded=0" not in first
    assert "encoded=0" in second
    first, second = await tiers(KeySettings(required=True, salt=True))
    assert first == second


async def test_a_proxy_s_tenants_stay_apart_behind_a_salted_key(redis_url: str, tmp_path: Path, stand_on: Any) -> None:
    cache = CacheSettings(memory_bytes=1 << 24, salt_header="x-tenant")
    async with stand_on(redis_url, tmp_path, keys=KeySettings(required=True, salt=True), cache=cache) as stand:

        async def encoded(**headers: str) -> bool:
            answer = await stand.client.post("/v1/embeddings", json={"prompt": "a star"}, headers=headers)
            return "encoded=0" not in answer.headers["x-tandem-cache"]

        one, two = await stand.key(), await stand.key()
        for key in (one, two):
            for tenant in ({}, {"x-tenant": "one"}, {"x-tenant": "two"}):
                assert await encoded(**key, **tenant)
                assert not await encoded(**key, **tenant)


async def test_a_revoked_key_is_refused_within_moments(keyed: Any) -> None:
    new = await keyed.keys.create("a key")
    headers = {"x-api-key": new.secret}
    assert (await keyed.client.get("/v1/models", headers=headers)).status_code == 200
    await keyed.keys.revoke(new.key.id)
    assert (await keyed.client.get("/v1/models", headers=headers)).status_code == 401


async def test_while_keys_can_not_be_looked_up_nobody_passes(
    jobs_redis: EmbeddedRedis, tmp_path: Path, stand_on: Any, refused: Any
) -> None:
    async with stand_on(jobs_redis.url, tmp_path, keys=KEYS) as stand:
        headers = await stand.key()
        jobs_redis.stop()
        answer = await stand.client.get("/v1/models", headers=headers)
        refused(answer, 503, "jobs.redis_url")
        assert int(answer.headers["retry-after"]) >= 1
        assert (await stand.client.get("/healthz")).status_code == 200


async def test_over_the_own_limits_is_a_429_that_tells_them(keyed: Any, refused: Any) -> None:
    headers = await keyed.key(allowance=Allowance(requests_per_minute=2, max_unfinished=2))
    first = await keyed.client.post("/v1/jobs", json=ORDER, headers=headers)
    assert first.headers["ratelimit-policy"] == (
        '"requests_per_minute";q=2;qu="requests";w=60, "max_unfinished";q=2;qu="concurrent-requests"'
    )
    assert first.headers["ratelimit"].startswith('"requests_per_minute";r=1;t=')
    assert first.headers["ratelimit"].endswith('"max_unfinished";r=1')
    assert (await keyed.client.post("/v1/jobs", json=ORDER, headers=headers)).status_code == 202
    answer = await keyed.client.post("/v1/jobs", json=ORDER, headers=headers)
    error = refused(answer, 429, None)
    assert (error["code"], error["type"]) == ("rate_limited", "unavailable_error")
    assert "requests_per_minute" in error["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert "r=0" in answer.headers["ratelimit"]
    free = await keyed.client.post("/v1/jobs", json=ORDER, headers=await keyed.key())
    assert free.status_code == 202, "the others' limits are their own"
    assert "ratelimit" not in free.headers


async def test_a_replay_tells_the_limits_too(keyed: Any) -> None:
    headers = await keyed.key(allowance=Allowance(max_unfinished=2)) | {"idempotency-key": "one"}
    for method, path in (("POST", "/v1/jobs"), ("PUT", f"/v1/jobs/{'ab' * 16}")):
        first = await keyed.client.request(method, path, json=ORDER, headers=headers)
        again = await keyed.client.request(method, path, json=ORDER, headers=headers)
        assert again.headers["idempotent-replayed"] == "true"
        for name in ("ratelimit", "ratelimit-policy"):
            assert again.headers[name] == first.headers[name]


async def test_who_is_over_the_own_bounds_is_told_so_in_a_full_house_too(
    redis_url: str, tmp_path: Path, stand_on: Any, refused: Any
) -> None:
    async with stand_on(redis_url, tmp_path, keys=KEYS, max_queued=2) as stand:
        bounded, free = await stand.key(allowance=Allowance(max_unfinished=1)), await stand.key()
        assert (await stand.client.post("/v1/jobs", json=ORDER, headers=bounded)).status_code == 202
        assert (await stand.client.post("/v1/jobs", json=ORDER, headers=free)).status_code == 202
        for headers, status, code in ((bounded, 429, "rate_limited"), (free, 503, "queue_full")):
            answer = await stand.client.post("/v1/jobs", json=ORDER, headers=headers)
            assert refused(answer, status, answer.json()["error"]["param"])["code"] == code
            quoted = (await stand.client.post("/v1/jobs?dry_run=true", json=ORDER, headers=headers)).json()
            assert quoted["would_be_refused"]["code"] == code
            assert quoted["would_be_refused"]["retry_after_s"] > 0
            assert quoted["would_be_refused"]["message"] == answer.json()["error"]["message"]


async def test_whoever_has_less_than_their_share_finds_a_place_in_a_full_house(
    redis_url: str, tmp_path: Path, stand_on: Any
) -> None:
    async with stand_on(redis_url, tmp_path, keys=KEYS, max_queued=4) as stand:
        greedy, late = await stand.key(), await stand.key()

        async def ordered(headers: dict[str, str]) -> int:
            return int((await stand.client.post("/v1/jobs", json=ORDER, headers=headers)).status_code)

        assert [await ordered(greedy) for _ in range(6)] == [202] * 4 + [503] * 2
        assert [await ordered(late) for _ in range(3)] == [202] * 2 + [503]
        assert await ordered(greedy) == 503


async def test_the_caller_s_limits(keyed: Any) -> None:
    headers = await keyed.key(allowance=Allowance(requests_per_minute=2, engine_s_per_day=3600.0), weight=2.0)
    await keyed.client.post("/v1/jobs", json=ORDER, headers=headers)
    answers = [await keyed.client.get("/v1/limits", headers=headers) for _ in range(3)]
    told = answers[-1].json()
    assert told["weight"] == 2.0
    assert set(told["scopes"]) == {"generate", "embed"}
    requests, engine = told["limits"]
    assert (requests["name"], requests["limit"], requests["remaining"]) == ("requests_per_minute", 2, 1)
    assert (engine["unit"], engine["limit"], engine["window_s"]) == ("engine-seconds", 3600, 86400)
    assert answers[-1].headers["ratelimit"].startswith('"requests_per_minute";r=1')
    unbounded = await keyed.client.get("/v1/limits", headers=await keyed.key())
    assert unbounded.json()["limits"] == []
    assert "ratelimit" not in unbounded.headers


async def test_tenants_of_a_proxy_see_their_own_jobs_alone(redis_url: str, tmp_path: Path, stand_on: Any) -> None:
    async with stand_on(redis_url, tmp_path, cache=CacheSettings(salt_header="x-tenant")) as stand:
        one, two = {"x-tenant": "one"}, {"x-tenant": "two"}
        job = (await stand.client.post("/v1/jobs", json=ORDER, headers=one)).json()
        for headers, status in ((one, 200), (two, 404), ({}, 404)):
            assert (await stand.client.get(f"/v1/jobs/{job['id']}", headers=headers)).status_code == status
            answer = await stand.client.get("/v1/jobs", headers=headers)
            assert len(answer.json()["data"]) == (status == 200)
