"""`POST /v1/benchmark`: what it answers, and when it doesn't."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.anyio


async def test_a_server_that_does_not_offer_it(stand: Any, refused: Any) -> None:
    assert refused(await stand.client.post("/v1/benchmark", json={}), 404, None)["code"] == "not_offered"


async def test_the_table_and_that_there_is_one_at_a_time(
    redis_url: str, tmp_path: Path, stand_on: Any, refused: Any
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def measured(model: str, width: int, height: int, steps: int) -> dict[str, dict[int, list[float]]]:
        begun.set()
        await go_on.wait()
        assert (model, width, height, steps) == ("shapes", 64, 72, 3)
        return {"shapes": {1: [0.5, 0.2, 0.1], 4: [0.4, 0.4, 0.4]}}

    async with stand_on(redis_url, tmp_path, benchmark=measured) as stand:
        order = {"width": 64, "height": 72, "num_inference_steps": 3}
        for field, value in (("width", 63), ("num_inference_steps", 0), ("num_inference_steps", 51), ("lanes", 2)):
            refused(await stand.client.post("/v1/benchmark", json=order | {field: value}), 422, field)
        refused(await stand.client.post("/v1/benchmark", json={"model": "other"}), 404, "model")
        asking = asyncio.create_task(stand.client.post("/v1/benchmark", json=order))
        await begun.wait()
        busy = await stand.client.post("/v1/benchmark", json=order)
        assert refused(busy, 429, None)["type"] == "unavailable_error"
        assert int(busy.headers["retry-after"]) >= 1
        go_on.set()
        answer = (await asking).json()
        table = answer["placements"]["shapes"]
        assert [(row["batch_size"], row["step_s"]) for row in table] == [(1, 0.2), (4, 0.4)]
        assert table[1]["images_per_s"] == pytest.approx(2 * table[0]["images_per_s"])
