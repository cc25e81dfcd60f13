"""Waiting for one job: what calls it off, and what it leaves behind."""

import asyncio

import pytest

from serve.errors import BackendUnavailable, GenerationFailed
from serve.patience import GivenBack, Patience, Withdrawn, first

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Backend:
    """Away for so many calls; every call is counted."""

    def __init__(self, away: int) -> None:
        self.away = away
        self.calls = 0
        self.called = asyncio.Event()
        self.left = asyncio.Event()

    async def answer(self) -> str:
        self.calls += 1
        self.called.set()
        if self.calls <= self.away:
            raise BackendUnavailable("it does not answer")
        return "an answer"

    async def hang(self) -> str:
        self.called.set()
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            self.left.set()


@pytest.fixture
async def events() -> tuple[asyncio.Event, asyncio.Event]:
    return asyncio.Event(), asyncio.Event()


async def test_a_call_is_repeated_until_the_backend_is_back(events: tuple[asyncio.Event, asyncio.Event]) -> None:
    backend = Backend(away=2)
    assert await Patience(*events).repeat(backend.answer) == "an answer"
    assert backend.calls == 3


async def test_a_call_is_made_once_whatever_has_happened(events: tuple[asyncio.Event, asyncio.Event]) -> None:
    """So that a cancelled job is told as cancelled, and a drained replica's finished job as finished."""
    for event in events:
        event.set()
    assert await Patience(*events).repeat(Backend(away=0).answer) == "an answer"


@pytest.mark.parametrize(("which", "reason"), [(0, Withdrawn), (1, GivenBack)])
@pytest.mark.parametrize("already", [True, False])
async def test_waiting_for_a_backend_is_called_off(
    events: tuple[asyncio.Event, asyncio.Event], which: int, reason: type[Exception], already: bool
) -> None:
    backend = Backend(away=1000)
    if already:
        events[which].set()
    waiting = asyncio.create_task(Patience(*events).repeat(backend.answer))
    await backend.called.wait()
    events[which].set()
    with pytest.raises(reason):
        await asyncio.wait_for(waiting, 5)
    assert backend.calls <= 2


@pytest.mark.parametrize(("which", "reason"), [(0, Withdrawn), (1, GivenBack), (None, asyncio.CancelledError)])
async def test_a_call_that_hangs_is_let_go(
    events: tuple[asyncio.Event, asyncio.Event], which: int | None, reason: type[BaseException]
) -> None:
    backend = Backend(away=0)
    waiting = asyncio.create_task(Patience(*events).obtain(backend.hang))
    await backend.called.wait()
    if which is None:
        waiting.cancel()
    else:
        events[which].set()
    with pytest.raises(reason):
        await asyncio.wait_for(waiting, 5)
    await asyncio.wait_for(backend.left.wait(), 5)


async def test_what_fails_otherwise_is_not_repeated(events: tuple[asyncio.Event, asyncio.Event]) -> None:
    async def broken() -> None:
        raise GenerationFailed("it broke")

    for wait in (Patience(*events).repeat, Patience(*events).obtain):
        with pytest.raises(GenerationFailed):
            await wait(broken)


async def test_a_drain_does_not_call_off_what_the_replica_computes(
    events: tuple[asyncio.Event, asyncio.Event],
) -> None:
    gone, draining = events
    draining.set()
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(Patience(gone, draining).finish(future))
    asyncio.get_running_loop().call_soon(future.set_result, "a picture")
    assert await waiting == "a picture"
    other: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    gone.set()
    with pytest.raises(Withdrawn):
        await Patience(gone, draining).finish(other)
    assert not other.cancelled()


async def test_of_what_is_done_together_the_earlier_named_counts() -> None:
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    done.set_result(None)
    other: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    other.set_result(None)
    assert await first(done, other) is done
    assert await first(other, done) is other
