"""The short form of `tandem bench compare`: what Tandem gains over a lock around the stock pipeline is held to the
ratio on record. Times play no part: a slower machine slows both."""

import asyncio
from statistics import fmean

import psutil
import pytest
from support.server import Server

from loadtest.bench.compare import Orders
from loadtest.bench.compare_load import Saturated, saturate
from loadtest.bench.compare_plan import own_cores
from loadtest.bench.compare_ratios import RECORD, SHORT, Ratio, hold, read_record
from loadtest.servers import TANDEM, Budget, Serving, serving
from serve.bench.stats import Spread
from serve.bench.windows import DISTURBED

USERS = 16
"""Two full batches."""
ORDERS = 60


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)  # a slow machine takes longer, and the ratio is the same
def test_tandem_over_a_lock_has_not_become_less(server: Server) -> None:
    """Tandem, the lock, Tandem again, with as many threads: what slows the machine down slowly hits both."""
    root = psutil.Process(server.process.pid)
    own = Serving(name=TANDEM, url=server.url, dialect="wait", root=root, data_dir=server.data_dir, metrics_url=None)

    async def measure() -> tuple[Saturated, Saturated, Saturated]:
        orders, cores = Orders.of(seed=0), own_cores()

        async def fill(which: Serving) -> Saturated:
            return await saturate(which, orders.saturating[:ORDERS], orders.unit, users=USERS)

        before = await fill(own)
        budget = Budget(cores=cores, torch_threads=max(1, len(cores) - 1))  # as many as Tandem takes by itself
        async with serving("lock", budget=budget) as lock:
            between = await fill(lock)
        return before, between, await fill(own)

    before, lock, after = asyncio.run(measure())
    for one in (before, lock, after):
        assert not one.faults, one.lost
        assert not one.refused
    gained = fmean(one.rate.median for one in (before, after)) / lock.rate.median
    record = read_record(RECORD)
    (held,) = hold([Ratio(name=SHORT, value=Spread.of([gained]), higher_is_better=True)], record)
    others = max(one.others for one in (before, lock, after))
    found = (
        f"{gained:.2f}x, on record {held.recorded.value:.2f}x with a tolerance of {held.recorded.tolerance:.2f}; "
        f"other processes took up to {others:.0%} of the processors meanwhile"
    )
    if held.worse and others > DISTURBED:  # its denoiser makes way for others, the stock pipeline does not
        pytest.skip(f"in doubt: {found}")
    assert not held.worse, found
