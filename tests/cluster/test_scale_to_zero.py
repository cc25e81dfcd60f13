"""A server without any diffusion replica, woken by orders, and asleep again: real Ray, real processes."""

from collections.abc import Iterator

import httpx
import pytest
from support.server import Server, launch, stop, wait_until

pytestmark = pytest.mark.slow
IDLE_S = 4
SETTINGS = {
    "TANDEM_DIFFUSION__REPLICAS": "0",
    "TANDEM_DIFFUSION__MIN_REPLICAS": "0",
    "TANDEM_DIFFUSION__MAX_REPLICAS": "2",
    "TANDEM_DIFFUSION__TARGET_WAIT_S": "0.5",
    "TANDEM_DIFFUSION__IDLE_S": str(IDLE_S),
    "TANDEM_DIFFUSION__TORCH_THREADS": "1",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = launch(tmp_path_factory.mktemp("sleeper"), **SETTINGS)
    yield server
    stop(server)


def test_from_none_to_two_and_back(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:

        def replicas() -> int:
            return len(server.replica_pids("Diffusion"))

        def sleeps() -> bool:
            return replicas() == 0 and bool(http.get("/readyz").json()["pools"]["diffusion"]["detail"] == "asleep")

        def order(prompt: str, steps: int = 4) -> str:
            answer = http.post("/v1/jobs", json={"prompt": prompt, "num_inference_steps": steps})
            assert answer.status_code == 202, answer.text
            return str(answer.json()["id"])

        def state(job_id: str) -> str:
            return str(http.get(f"/v1/jobs/{job_id}").json()["state"])

        assert sleeps()
        assert http.get("/readyz").status_code == 200
        (place,) = http.get("/v1/fleet").json()["data"]
        assert (place["replicas_wanted"], place["replicas_max"], place["replicas"]) == (0, 2, [])
        refused = http.post("/v1/benchmark", json={})
        assert (refused.status_code, replicas()) == (503, 0), "a question wakes nobody"

        first = order("a red circle")
        wait_until(lambda: state(first) == "succeeded", 120, "the order that wakes it")
        burst = [order(f"a blue square {number}", steps=100) for number in range(20)]
        wait_until(lambda: replicas() == 2, 120, "more work to bring a second one")
        wait_until(lambda: all(state(each) == "succeeded" for each in burst), 240, "the burst")
        wait_until(sleeps, 60, "all to sleep")

        second = http.post("/v1/jobs", json={"prompt": "a red circle"}).json()
        assert second["eta_s"] > 1, "it says what the cold start takes"
        wait_until(lambda: state(second["id"]) == "succeeded", 120, "the next order")
