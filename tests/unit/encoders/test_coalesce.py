import asyncio
import threading

import pytest

from serve.encoders.coalesce import Coalescer


class Machine:
    """What batches are run by: records them, and runs only when it is let."""

    def __init__(self, free: bool = True) -> None:
        self.batches: list[list[int]] = []
        self.started = threading.Semaphore(0)
        self.let = threading.Semaphore(1000 if free else 0)

    def run(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.started.release()
        assert self.let.acquire(timeout=10)
        if -1 in items:
            raise ArithmeticError("minus one")
        return [item * 10 for item in items]


async def until_started(machine: Machine) -> None:
    assert await asyncio.to_thread(machine.started.acquire, timeout=10)


def test_what_is_submitted_together_runs_together() -> None:
    async def main() -> None:
        machine = Machine()
        coalescer = Coalescer(machine.run, 8)
        assert await coalescer.submit_all([1, 2, 3]) == [10, 20, 30]
        assert await asyncio.gather(*(coalescer.submit(item) for item in range(4))) == [0, 10, 20, 30]
        assert machine.batches == [[1, 2, 3], [0, 1, 2, 3]]
        assert await coalescer.submit_all([]) == []
        await coalescer.close()

    asyncio.run(main())


def test_an_idle_one_waits_for_nobody() -> None:
    """The batch starts although its only caller is all there ever will be; nothing lets time pass."""

    async def main() -> None:
        machine = Machine()
        coalescer = Coalescer(machine.run, 32)
        for item in range(3):
            assert await coalescer.submit(item) == item * 10
        assert machine.batches == [[0], [1], [2]]
        await coalescer.close()

    asyncio.run(main())


def test_a_batch_grows_while_another_runs_up_to_the_limit() -> None:
    async def main() -> None:
        machine = Machine(free=False)
        coalescer = Coalescer(machine.run, 4)
        first = asyncio.create_task(coalescer.submit(0))
        await until_started(machine)
        rest = [asyncio.create_task(coalescer.submit(item)) for item in range(1, 7)]
        await asyncio.sleep(0)
        machine.let.release(10)
        assert await asyncio.gather(first, *rest) == [0, 10, 20, 30, 40, 50, 60]
        assert machine.batches == [[0], [1, 2, 3, 4], [5, 6]]
        await coalescer.close()

    asyncio.run(main())


def test_cancelled_callers_are_dropped_before_the_batch() -> None:
    async def main() -> None:
        machine = Machine(free=False)
        coalescer = Coalescer(machine.run, 4)
        first = asyncio.create_task(coalescer.submit(0))
        await until_started(machine)
        leaver, stayer = (asyncio.create_task(coalescer.submit(item)) for item in (1, 2))
        await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.sleep(0)
        machine.let.release(10)
        assert await asyncio.gather(first, stayer) == [0, 20]
        assert machine.batches == [[0], [2]]
        await coalescer.close()

    asyncio.run(main())


def test_a_caller_cancelled_during_its_batch_harms_nobody() -> None:
    async def main() -> None:
        machine = Machine(free=False)
        coalescer = Coalescer(machine.run, 4)
        leaver, stayer = (asyncio.create_task(coalescer.submit(item)) for item in (1, 2))
        await until_started(machine)
        leaver.cancel()
        machine.let.release(10)
        assert await stayer == 20
        assert await coalescer.submit(3) == 30
        await coalescer.close()

    asyncio.run(main())


def test_an_exception_belongs_to_its_batch() -> None:
    async def main() -> None:
        machine = Machine(free=False)
        coalescer = Coalescer(machine.run, 2)
        bad = asyncio.create_task(coalescer.submit(-1))
        await until_started(machine)
        good = asyncio.create_task(coalescer.submit(5))
        await asyncio.sleep(0)
        machine.let.release(10)
        with pytest.raises(ArithmeticError):
            await bad
        assert await good == 50
        with pytest.raises(ArithmeticError):
            await coalescer.submit_all([-1, 2])
        assert await coalescer.submit(6) == 60
        await coalescer.close()

    asyncio.run(main())


def test_a_wrong_number_of_results_is_an_error() -> None:
    async def main() -> None:
        coalescer = Coalescer(lambda items: items[1:], 8)
        with pytest.raises(ValueError, match="0 results for 1 items"):
            await coalescer.submit(1)
        await coalescer.close()

    asyncio.run(main())


def test_close_cancels_who_waits() -> None:
    async def main() -> None:
        machine = Machine(free=False)
        coalescer = Coalescer(machine.run, 1)
        waiting = [asyncio.create_task(coalescer.submit(item)) for item in range(3)]
        await until_started(machine)
        await coalescer.close()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 3
        machine.let.release(10)

    asyncio.run(main())
