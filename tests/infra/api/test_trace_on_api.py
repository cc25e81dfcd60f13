"""`tandem trace` against the real API, service and job store, over a real connection."""

import json
from typing import Any

import pytest
from support.listening import listening

from serve.cli.client import Client
from serve.cli.trace import trace
from serve.errors import JobNotFound

pytestmark = pytest.mark.anyio


async def test_a_job_is_traced_from_the_queue_to_its_end(stand: Any, capsys: pytest.CaptureFixture[str]) -> None:
    async with listening(stand.app) as port:
        job_id = (await stand.create(num_inference_steps=2))["id"]

        async def told(ids: list[str], last: int | None = None, *, as_json: bool = True) -> Any:
            assert await trace(Client(f"http://127.0.0.1:{port}"), ids, last, as_json=as_json) == 0
            text = capsys.readouterr().out
            return json.loads(text) if as_json else text

        waiting = await told([job_id])
        assert (waiting["state"], waiting["wall_s"], waiting["explained"]) == ("queued", None, None)
        assert [bar["stage"] for bar in waiting["stages"]] == ["admission"]
        assert "1st in the queue" in await told([job_id], as_json=False)
        assert (await told([], 5))["jobs"] == []

        await stand.finish(job_id)
        ended = await told([job_id])
        bars = {bar["stage"]: bar for bar in ended["stages"]}
        assert ended["state"] == "succeeded"
        assert {"admission", "queued"} <= set(bars)
        assert bars["queued"]["starts_s"] == bars["admission"]["seconds"]
        assert 0 < ended["explained"] <= 1
        known = sum(bar["seconds"] for bar in bars.values())
        assert ended["wall_s"] == pytest.approx(known + ended["unexplained_s"])
        assert [job["id"] for job in (await told([], 5))["jobs"]] == [job_id]
        assert "explains" in await told([job_id], as_json=False)

        with pytest.raises(JobNotFound):
            await told(["f" * 32])
