"""What may stand in a query: what the route knows, and nothing else."""

import inspect
from typing import Any

import pytest

pytestmark = pytest.mark.anyio


async def test_an_unknown_query_parameter_is_refused_by_every_native_route(stand: Any, refused: Any) -> None:
    schema = (await stand.client.get("/openapi.json")).json()
    found = [(method, path, told) for path, methods in schema["paths"].items() for method, told in methods.items()]
    routes = [(method, path) for method, path, told in found if path.startswith("/v1") and told["tags"] != ["openai"]]
    assert len(routes) >= 13
    for method, path in routes:
        place = path.replace("{id}", "0" * 32).replace("{index}", "0")
        body = {"prompt": "a"} if method in ("post", "put") else None
        for query in ("nonsense=1", "Wait=true", "dry-run=true"):
            answer = await stand.client.request(method.upper(), f"{place}?{query}", json=body)
            name = query.partition("=")[0]
            assert name in refused(answer, 422, name)["message"], (method, path)
    assert await stand.jobs.queue_depth() == 0


async def test_of_several_the_name_of_the_parameter_alone_is_told(stand: Any, refused: Any) -> None:
    for query in ("state=x", "state=queued&state=x"):
        error = refused(await stand.client.get(f"/v1/jobs?{query}"), 422, "state")
        assert error["message"].startswith("state: ")


async def test_no_dependency_of_a_route_goes_through_a_thread(stand: Any) -> None:
    """FastAPI sends each plain function through its thread pool: two thread switches for every request."""
    depended = [call for route in routes_of(stand.app) for call in calls_of(route.dependant)]
    assert len(depended) > 20
    assert [call for call in depended if not is_coroutine(call)] == []


def routes_of(app: Any) -> list[Any]:
    found, left = [], list(app.routes)
    while left:
        route = left.pop()
        left += getattr(getattr(route, "original_router", None), "routes", ())
        if hasattr(route, "dependant"):
            found.append(route)
    return found


def calls_of(dependant: Any) -> list[Any]:
    below = [call for each in dependant.dependencies for call in calls_of(each)]
    return below + ([dependant.call] if dependant.call else [])


def is_coroutine(call: Any) -> bool:
    """Some of FastAPI's own are objects that are called."""
    function = call if inspect.isroutine(call) else type(call).__call__
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
