"""Which placement work falls to, and how many replicas it takes: by example, and by its rules."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from serve.scaling.demand import FULL, Band, Place, carried, desired

SMALL = Place("small", "m", 64, 0, 4, target_wait_s=10)
LARGE = Place("large", "m", 256, 0, 2, target_wait_s=10)
BOTH = (LARGE, SMALL)


def band(upto: int, queued_s: float = 0.0, held_s: float = 0.0, jobs: int = 1, **other: float) -> Band:
    return Band(0, upto, 1000 * queued_s, 1000 * held_s, jobs, **other)


def wanted(places: Sequence[Place], *bands: Band) -> dict[str, int]:
    return desired(places, {"m": bands})


def test_each_replica_gets_what_it_does_within_the_target() -> None:
    assert wanted((SMALL,), band(64, 10.0)) == {"small": 1}
    assert wanted((SMALL,), band(64, 10.5)) == {"small": 2}
    assert wanted((SMALL,), band(64, 20.0, held_s=5.0)) == {"small": 3}, "what is in hand is not done either"
    assert wanted((SMALL,), band(64, 1e6)) == {"small": 4}
    slow = replace(SMALL, pace=2.0)
    assert wanted((slow,), band(64, 15.0)) == {"small": 3}, "15 s that take 30"


def test_any_work_at_all_wakes_a_placement_that_sleeps() -> None:
    assert wanted((SMALL,), band(64, 0.001)) == {"small": 1}
    assert wanted((SMALL,), band(64, 0.0, jobs=1)) == {"small": 1}, "it is being stored"
    assert wanted((SMALL,), Band(0, 64)) == {"small": 0}
    assert desired((SMALL,), {"another": [band(64, 100.0)]}) == {"small": 0}
    assert desired((SMALL,), {}) == {"small": 0}


def test_work_falls_to_the_smallest_that_holds_it_and_spills_to_the_next() -> None:
    assert wanted(BOTH, band(64, 35.0)) == {"small": 4, "large": 0}
    assert wanted(BOTH, band(64, 45.0)) == {"small": 4, "large": 1}
    assert wanted(BOTH, band(256, 15.0)) == {"small": 0, "large": 2}
    assert wanted(BOTH, band(256, 1000.0)) == {"small": 0, "large": 2}, "nobody larger is there"
    assert wanted(BOTH, band(64, 45.0), band(256, 20.0)) == {"small": 4, "large": 2}, "there is no room for the rest"
    assert wanted(BOTH, band(512, 10.0)) == {"small": 0, "large": 0}, "nobody holds it"


def test_what_never_sleeps_has_its_share_first() -> None:
    """An idle replica claims smaller work too: nobody is woken for what it has the time for."""
    places = (SMALL, replace(LARGE, min_replicas=1))
    assert wanted(places, band(64, 9.0)) == {"small": 0, "large": 1}
    assert wanted(places, band(64, 19.0)) == {"small": 1, "large": 1}
    assert wanted(places, band(64, 9.0), band(256, 10.0)) == {"small": 1, "large": 1}


def test_what_ran_out_of_memory_wakes_who_has_more() -> None:
    places = (replace(SMALL, outdone_mb=4000), replace(LARGE, outdone_mb=11000))
    assert wanted(places, band(64, 5.0, above_mb=4000)) == {"small": 0, "large": 1}
    assert wanted(places, band(64, 5.0, above_mb=11000)) == {"small": 1, "large": 0}, "no card has more"
    assert wanted(BOTH, band(64, 5.0, above_mb=1)) == {"small": 1, "large": 0}, "nobody knows what cards have"


def test_arriving_work_needs_replicas_that_are_not_always_busy() -> None:
    assert carried(BOTH, {"m": [band(64, rate=FULL)]}) == {"small": 1, "large": 0}
    assert carried(BOTH, {"m": [band(64, rate=1.0)]}) == {"small": 2, "large": 0}
    assert carried((replace(SMALL, pace=0.5),), {"m": [band(64, rate=1.0)]}) == {"small": 1}


PLACES = st.lists(
    st.builds(
        lambda pixels, least, more, target, pace, outdone: Place(
            "", "m", pixels, least, least + more, target, pace, outdone
        ),
        st.sampled_from([64, 128, 256]),
        st.integers(0, 3),
        st.integers(0, 5),
        st.floats(1, 100),
        st.floats(0.2, 5),
        st.sampled_from([0, 4000, 8000]),
    ),
    min_size=1,
    max_size=4,
).map(lambda places: [replace(place, name=str(n)) for n, place in enumerate(places)])
BANDS = st.lists(
    st.builds(
        Band,
        st.just(0),
        st.sampled_from([64, 128, 256]),
        st.floats(0, 1e6),
        st.floats(0, 1e6),
        st.integers(0, 5),
        st.floats(0, 10),
        st.sampled_from([0, 0, 3000]),
    ),
    max_size=6,
)


@given(PLACES, BANDS)
def test_nobody_has_more_than_it_may_or_than_all_work_would_need(places: list[Place], bands: list[Band]) -> None:
    found = desired(places, {"m": bands})
    for place in places:
        assert place.min_replicas <= found[place.name] <= place.max_replicas
        held = sum(band.backlog_ms for band in bands if band.upto <= place.max_pixels)
        assert found[place.name] < held / place.target_ms + 1 or found[place.name] == place.min_replicas


@given(PLACES, BANDS)
def test_no_work_waits_beyond_the_target_while_there_may_be_more_replicas(
    places: list[Place], bands: list[Band]
) -> None:
    found = desired(places, {"m": bands})

    def has_room(band: Band) -> bool:
        """Of those that hold it, and for what ran out of memory only where it may go to any."""
        able = [place for place in places if place.max_pixels >= band.upto]
        if band.above_mb and any(place.outdone_mb > band.above_mb for place in able):
            able = [place for place in able if place.outdone_mb > band.above_mb]
        return any(found[place.name] < place.max_replicas for place in able)

    work = sum(band.backlog_ms for band in bands if has_room(band))
    assert work <= sum(found[place.name] * place.target_ms for place in places) * (1 + 1e-6)


@given(PLACES, BANDS, st.data())
def test_more_work_never_takes_fewer_replicas(places: list[Place], bands: list[Band], data: st.DataObject) -> None:
    more = [replace(band, queued_ms=band.queued_ms + data.draw(st.floats(0, 1e6))) for band in bands]
    before, after = desired(places, {"m": bands}), desired(places, {"m": more})
    assert all(after[name] >= number for name, number in before.items())
