"""What a server can do at most of a workload's requests: the measure of its `load`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loadtest.bench.compare_work import mean_weight, rate_of, weights
from loadtest.driver import Progress, drive
from loadtest.report.results import TEXT_DIALECTS
from loadtest.samples import Arrival, Outcome
from loadtest.trace import Catalog, trace
from loadtest.workload import Closed, Workload
from serve.errors import OperatorError

USERS = 16
"""Requests under way while capacity is measured: more than a batch holds."""
CAPACITY_S = 20.0
_ORDERS = 4000
_REFUSED = 0.1
"""Share of the requests beyond which a server that refuses is not busy, and shows no capacity."""
_WARM_UP_USERS, _WARM_UP_ORDERS = 2, 4
_OTHER_WORDS = 1_000_003
"""Between the seeds of a run and of what comes before it, so that no text of the run is cached by then."""

Show = Callable[[Progress], None]


async def capacity(
    target: str, workload: Workload, catalog: Catalog, seed: int, key: str | None, show: Show | None = None
) -> float:
    """Requests a second that the server answers while `USERS` are always under way, for `CAPACITY_S` seconds; the first
    answers, which warm it up, are not counted. An answer counts by its work beside that of the workload's mean order:
    the few that are measured may be long ones or short ones. Raises OperatorError for a server that is too slow to
    tell, or that refuses."""
    closed = _closed(workload, USERS, _ORDERS)
    arrivals = trace(closed, seed + _OTHER_WORDS, catalog)
    samples = await drive(
        target,
        arrivals,
        users=USERS,
        give_up_s=workload.give_up_s,
        key=key,
        on_progress=show,
        until_s=CAPACITY_S,
    )
    refused = sum(sample.outcome is Outcome.REFUSED for sample in samples)
    if refused > _REFUSED * len(samples):
        raise OperatorError(
            f"--capacity: {refused} of {len(samples)} requests were refused with {USERS} under way, so that the server "
            "shows no capacity; name the capacity, or a --rate",
            "capacity",
        )
    work = work_of(arrivals)
    ended = sorted((sample.ended_s, work[sample.index]) for sample in samples if sample.outcome is Outcome.DONE)
    try:
        return rate_of([one for one in ended[USERS - 1 :] if one[0] <= CAPACITY_S])
    except ValueError:
        raise OperatorError(
            f"--capacity: {len(ended)} of {len(samples)} requests were answered in {CAPACITY_S:g} s, too few; "
            "name the capacity, or a --rate",
            "capacity",
        ) from None


def work_of(arrivals: Sequence[Arrival]) -> list[float]:
    """Each order's work, in mean orders. Where texts are asked for alone or beside pictures, all weigh the same."""
    if any(arrival.dialect in TEXT_DIALECTS for arrival in arrivals):
        return [1.0] * len(arrivals)
    orders = [arrival.body for arrival in arrivals]
    return weights(orders, mean_weight(orders))


async def warm_up(target: str, workload: Workload, catalog: Catalog, seed: int, key: str | None) -> None:
    """A few requests that are in no figure: the first ones that a server gets take longer."""
    closed = _closed(workload, _WARM_UP_USERS, _WARM_UP_ORDERS)
    arrivals = trace(closed, seed + _OTHER_WORDS, catalog)
    await drive(target, arrivals, users=_WARM_UP_USERS, give_up_s=workload.give_up_s, key=key)


def _closed(workload: Workload, users: int, orders: int) -> Workload:
    """The same requests one after another, of clients who stay."""
    return workload.model_copy(update={"arrivals": Closed(users=users, orders=orders), "hang_ups": None})
