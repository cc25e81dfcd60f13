"""The OpenAPI page and schema, and the links that answers carry."""

import json
import re
from typing import Any

import pytest

pytestmark = pytest.mark.anyio


async def test_the_page_needs_nothing_from_the_internet(stand: Any) -> None:
    home = await stand.client.get("/")
    assert (home.status_code, home.headers["location"]) == (307, "/docs")
    page = await stand.client.get("/docs")
    assert page.status_code == 200
    assert "//" not in re.sub(r"<!--.*?-->|^\s*//.*$", "", page.text, flags=re.M)
    assert re.search(r'"?validatorUrl"?: null', page.text)
    assets = re.findall(r"""(?:src|href)="([^"]+)"|url: '([^']+)'""", page.text)
    assert len(assets) >= 4
    for asset in assets:
        answer = await stand.client.get("".join(asset))
        assert answer.status_code == 200
        assert answer.content


ROUTES = {
    "POST /v1/jobs",
    "GET /v1/jobs",
    "PUT /v1/jobs/{id}",
    "GET /v1/jobs/{id}",
    "DELETE /v1/jobs/{id}",
    "GET /v1/jobs/{id}/events",
    "GET /v1/images/{id}/{index}",
    "GET /v1/models",
    "GET /v1/models/{id}",
    "GET /v1/fleet",
    "GET /v1/limits",
    "POST /v1/benchmark",
    "POST /v1/captions",
    "POST /v1/images/generations",
    "POST /v1/images/edits",
    "POST /v1/images/variations",
    "POST /v1/embeddings",
    "GET /v1/cache",
    "DELETE /v1/cache",
    "POST /v1/prompts/analyze",
    "POST /v1/prompts/similarity",
    "POST /internal/progress",
    "POST /generate",
    "GET /status/{id}",
    "GET /outputs/{name}",
    "GET /healthz",
    "GET /readyz",
}
A1111_GETS = """
cmd-flags embeddings extensions face-restorers hypernetworks latent-upscale-modes loras memory options progress
prompt-styles realesrgan-models samplers schedulers script-info scripts sd-models sd-vae upscalers
"""
A1111_POSTS = """
img2img interrogate interrupt options png-info refresh-checkpoints refresh-loras refresh-vae skip txt2img
"""


async def test_the_schema_describes_every_route(stand: Any) -> None:
    schema = (await stand.client.get("/openapi.json")).json()
    routes = {f"{method.upper()} {path}" for path, methods in schema["paths"].items() for method in methods}
    a1111 = {f"GET /sdapi/v1/{name}" for name in A1111_GETS.split()}
    a1111 |= {f"POST /sdapi/v1/{name}" for name in A1111_POSTS.split()}
    assert routes == ROUTES | a1111


async def test_the_schema_is_whole_and_has_only_our_shapes(stand: Any) -> None:
    schema = (await stand.client.get("/openapi.json")).json()
    known = schema["components"]["schemas"]
    assert set(re.findall(r"#/components/schemas/(\w+)", json.dumps(schema))) <= set(known)
    assert "HTTPValidationError" not in known
    for order in ("JobOrder", "EmbeddingOrder", "BenchmarkOrder"):
        assert known[order]["additionalProperties"] is False
        assert known[order].get("required", ["prompt"]) == ["prompt"]
        assert all("description" in field for field in known[order]["properties"].values())
    answer = schema["paths"]["/v1/embeddings"]["post"]["responses"]["200"]
    assert answer["content"]["application/octet-stream"]["schema"] == {"type": "string", "format": "binary"}
    assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/EmbeddingReport")
    assert "x-tandem-cache" in answer["headers"]
    job = ("id", "state", "position", "step", "steps", "timings", "cache", "truncated", "images", "request", "error")
    assert set(job) <= set(known["JobView"]["properties"])
    assert set(known["CacheReport"]["properties"]) == {"memory", "redis", "encoded"}


async def test_under_a_mount_links_lead_through_it(stand: Any) -> None:
    stand.app.root_path = "/tandem"
    answer = await stand.client.post("/v1/jobs", json={"prompt": "a red circle"})
    assert answer.headers["location"] == f"/tandem/v1/jobs/{answer.json()['id']}"
    await stand.finish(answer.json()["id"])
    job = (await stand.client.get(f"/v1/jobs/{answer.json()['id']}")).json()
    assert job["images"][0]["url"].startswith("/tandem/v1/images/")
    assert (await stand.client.get("/")).headers["location"] == "/tandem/docs"
    assert "/tandem/openapi.json" in (await stand.client.get("/docs")).text
