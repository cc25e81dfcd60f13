"""The bound on finished images that wait for the store."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.spool import Spool
from serve.telemetry.metrics import InProcessMetrics


def test_what_fits_is_taken_until_the_block_ends() -> None:
    metrics = InProcessMetrics()
    spool = Spool(100, metrics)
    with spool.room(60) as first:
        assert first
        assert not spool.fits(41)
        with spool.room(41) as second:
            assert not second
            assert spool.held == 60
            with spool.room(40) as third:
                assert third
                assert metrics.value("tandem_spool_bytes") == 100
    assert (spool.held, metrics.value("tandem_spool_bytes")) == (0, 0)


def test_room_is_given_back_where_the_block_fails() -> None:
    spool = Spool(100, InProcessMetrics())
    for nbytes in (60, 101):
        with pytest.raises(RuntimeError), spool.room(nbytes):
            raise RuntimeError
    assert spool.held == 0


def test_a_spool_of_nothing_takes_nothing() -> None:
    with Spool(0, InProcessMetrics()).room(1) as fits:
        assert not fits


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60))))
def test_the_bound_holds_in_any_order(acts: list[tuple[bool, int]]) -> None:
    spool, held = Spool(100, InProcessMetrics()), []
    for enter, number in acts:
        if enter:
            room = spool.room(number)
            fits = room.__enter__()
            held.append((room, number if fits else 0))
        elif held:
            held.pop(number % len(held))[0].__exit__(None, None, None)
        spool.check_integrity()
        assert spool.held == sum(nbytes for _, nbytes in held)
