"""What a server can do at most of a workload's requests: the measure of its `load`."""

from __future__ import annotations

from collections.abc import Callable

from loadtest.driver import Progress, drive
from loadtest.samples import Outcome
from loadtest.trace import Catalog, trace
from loadtest.workload import Closed, Workload
from serve.bench.load import steady_rate
from serve.errors import OperatorError

USERS = 16
"""Requests under way while capacity is measured: more than a batch holds."""
CAPACITY_S = 20.0
_ORDERS = 4000
_WARM_UP_USERS, _WARM_UP_ORDERS = 2, 4
_OTHER_WORDS = 1_000_003
"""Between the seeds of a run and of what comes before it, so that no text of the run is cached by then."""

Show = Callable[[Progress], None]


async def capacity(
    target: str, workload: Workload, catalog: Catalog, seed: int, key: str | None, show: Show | None = None
) -> float:
    """Requests a second that the server answers while `USERS` are always under way, for `CAPACITY_S` seconds; the first
    answers, which warm it up, are not counted. Raises OperatorError for a server that is too slow to tell."""
    closed = _closed(workload, USERS, _ORDERS)
    samples = await drive(
        target,
        trace(closed, seed + _OTHER_WORDS, catalog),
        users=USERS,
        give_up_s=workload.give_up_s,
        key=key,
        on_progress=show,
        until_s=CAPACITY_S,
    )
    ended = sorted(sample.ended_s for sample in samples if sample.outcome is Outcome.DONE)
    try:
        return steady_rate([time for time in ended[USERS - 1 :] if time <= CAPACITY_S])
    except ValueError:
        raise OperatorError(
            f"--capacity: {len(ended)} of {len(samples)} requests were answered in {CAPACITY_S:g} s, too few; "
            "name the capacity, or a --rate",
            "capacity",
        ) from None


async def warm_up(target: str, workload: Workload, catalog: Catalog, seed: int, key: str | None) -> None:
    """A few requests that are in no figure: the first ones that a server gets take longer."""
    closed = _closed(workload, _WARM_UP_USERS, _WARM_UP_ORDERS)
    arrivals = trace(closed, seed + _OTHER_WORDS, catalog)
    await drive(target, arrivals, users=_WARM_UP_USERS, give_up_s=workload.give_up_s, key=key)


def _closed(workload: Workload, users: int, orders: int) -> Workload:
    """The same requests one after another, of clients who stay."""
    return workload.model_copy(update={"arrivals": Closed(users=users, orders=orders), "hang_ups": None})
