"""What the Ray carrier of metrics does by itself; what Ray exports of it is tests/cluster/test_metrics.py."""

import asyncio

import pytest

from deployments.metrics import telling


class Gauges:
    def __init__(self) -> None:
        self.told = 0
        self.thrice = asyncio.Event()

    def tell(self) -> None:
        self.told += 1
        if self.told == 3:
            self.thrice.set()


def test_a_replica_that_drains_tells_until_it_has_drained() -> None:
    """Serve asks it for its health no more, and Prometheus forgets a gauge that nobody tells."""

    async def story() -> None:
        gauges = Gauges()
        async with telling(gauges.tell, interval_s=0.001):
            await asyncio.wait_for(gauges.thrice.wait(), 10)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "nobody tells any more"

    asyncio.run(story())


def test_what_ends_the_drain_ends_the_telling() -> None:
    gauges = Gauges()

    async def story() -> None:
        try:
            async with telling(gauges.tell, interval_s=60):
                await asyncio.sleep(0)
                raise OSError("cut off")
        finally:
            assert asyncio.all_tasks() == {asyncio.current_task()}

    with pytest.raises(OSError, match="cut off"):
        asyncio.run(story())
    assert gauges.told == 1


def test_gauges_that_can_not_be_told_do_not_keep_a_replica_from_draining() -> None:
    def tell() -> None:
        raise RuntimeError("the driver is gone")

    async def story() -> str:
        async with telling(tell, interval_s=0.001):
            await asyncio.sleep(0)
            return "drained"

    assert asyncio.run(story()) == "drained"
