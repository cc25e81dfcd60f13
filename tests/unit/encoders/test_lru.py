from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from serve.encoders.lru import ENTRY_OVERHEAD, ByteLru

KEYS = st.sampled_from("abcde")
VALUES = st.integers(0, 600).map(bytes)


@given(st.integers(0, 2500), st.lists(st.tuples(KEYS, st.none() | VALUES), max_size=60))
def test_behaves_like_a_dict_that_forgets_the_oldest(capacity: int, calls: list[tuple[str, bytes | None]]) -> None:
    lru = ByteLru(capacity)
    model: OrderedDict[str, bytes] = OrderedDict()
    for key, value in calls:
        if value is None:
            assert lru.get(key) == model.get(key)
            if key in model:
                model.move_to_end(key)
        else:
            lru.put(key, value)
            model.pop(key, None)
            if len(value) + ENTRY_OVERHEAD <= capacity:
                model[key] = value
            while sum(len(each) + ENTRY_OVERHEAD for each in model.values()) > capacity:
                model.popitem(last=False)
        lru.check_integrity()
        assert len(lru) == len(model)
        assert [each in lru for each in "abcde"] == [each in model for each in "abcde"]
    lru.clear()
    lru.check_integrity()
    assert len(lru) == lru.bytes == 0


def test_a_huge_value_pushes_nothing_out() -> None:
    lru = ByteLru(1000)
    lru.put("small", b"s")
    lru.put("huge", bytes(5000))
    assert lru.get("small") == b"s"
    assert lru.get("huge") is None


def test_a_value_that_outgrew_the_capacity_is_not_served_stale() -> None:
    lru = ByteLru(1000)
    lru.put("key", b"old")
    lru.put("key", bytes(5000))
    assert lru.get("key") is None
