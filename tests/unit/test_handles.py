"""What is asked of Serve's controller, which may hang."""

import asyncio
import threading

import pytest
from ray.exceptions import RayError
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ServeStatus,
)

from deployments.handles import Controller

SLEEPS = DeploymentStatusOverview(
    status=DeploymentStatus.HEALTHY,
    status_trigger=DeploymentStatusTrigger.DOWNSCALE_COMPLETED,
    replica_states={},
    message="",
)
STATUS = ServeStatus(
    applications={
        "tandem": ApplicationStatusOverview(
            status=ApplicationStatus.RUNNING, message="", last_deployed_time_s=0.0, deployments={"t5": SLEEPS}
        )
    }
)


def test_a_controller_that_hangs_holds_one_thread() -> None:
    calls: list[int] = []
    answers = threading.Event()

    def ask() -> ServeStatus:
        calls.append(threading.get_ident())
        assert answers.wait(10)
        return STATUS

    async def main() -> None:
        controller = Controller(ask)
        for _ in range(20):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(controller.overview("tandem", "t5"), 0.001)
        patient = [asyncio.create_task(controller.overview("tandem", "t5")) for _ in range(3)]
        await asyncio.sleep(0)
        answers.set()
        assert await asyncio.gather(*patient) == [SLEEPS] * 3
        assert len(calls) == 1
        assert await controller.overview("tandem", "another") is None
        assert len(set(calls)) == 1

    asyncio.run(main())


def test_a_controller_that_is_gone_knows_nothing() -> None:
    def ask() -> ServeStatus:
        raise RayError("no controller")

    assert asyncio.run(Controller(ask).overview("tandem", "t5")) is None
