"""Which other cards are larger for a job that ran out of memory, and how long it waits for them."""

import pytest

from serve.jobs.records import Marks, outdone
from serve.jobs.terms import WorkerReport
from serve.memory.planner import plan
from serve.memory.shapes import published
from serve.placements import Placement
from serve.relief import AGED_S, STARTING_S, Card, Cards, Fortune, cards_of, living
from serve.rungs import Rung
from serve.settings.pools import DiffusionSettings

SQUARE = 1024 * 1024


def a_placement(memory_gb: float) -> Placement:
    """Of sd35-large, as it is planned for a card of that size."""
    made = plan(published()["sd35-large"], memory_gb * 1e9, ("float16",))
    return Placement(
        name=f"{memory_gb:g}gb",
        model="sd35-large",
        gpu_class=f"{memory_gb:g}gb",
        settings=DiffusionSettings(),
        max_pixels=made.max_pixels,
        rung=made.rung,
        plan=made,
        memory_bytes=int(memory_gb * 1e9),
    )


def a_report(memory_mb: int, max_pixels: int) -> WorkerReport:
    return WorkerReport(
        name="w",
        model="m",
        placement="p",
        max_pixels=max_pixels,
        max_rows=8,
        batch=8,
        vae_factor=8,
        memory_mb=memory_mb,
    )


def test_a_larger_card_counts_for_the_images_that_it_draws() -> None:
    """More memory makes a better rung, and that may hold smaller images than offloading on a small card does."""
    small, large = a_placement(4), a_placement(11)
    assert (small.rung, large.rung) == (Rung.OFFLOAD, Rung.INT8)
    assert small.max_pixels > large.max_pixels > SQUARE
    cards = cards_of(small, (small, large), 600.0)
    assert cards.larger(SQUARE)
    assert cards.larger(large.max_pixels)
    assert not cards.larger(large.max_pixels + 1)
    assert Fortune(None).gives_back(cards, SQUARE).above_mb == 4000
    assert Fortune(None).gives_back(cards, small.max_pixels).above_mb is None
    assert not cards_of(large, (small, large), 600.0).larger(1)


def test_the_wait_for_a_larger_card_is_the_jobs_own() -> None:
    """By its pixels: what no larger card draws is nobody else's."""
    told = living([a_report(4000, 4 * SQUARE), a_report(24_000, SQUARE // 2)])
    cards = Cards(own=4000, planned=(Card(4000, 4 * SQUARE), Card(11_000, 2 * SQUARE)), alive=told)
    assert cards.marks == Marks(alive=SQUARE // 2, coming=2 * SQUARE, coming_s=STARTING_S, rest_s=AGED_S)
    assert cards.larger(2 * SQUARE)
    assert not cards.larger(3 * SQUARE)
    assert not Cards().larger(1), "what this card has is not known"


@pytest.mark.parametrize(("memory_mb", "more"), [(4000, False), (4002, False), (4200, False), (4201, True)])
def test_a_few_megabytes_more_are_no_larger_card(memory_mb: int, more: bool) -> None:
    other = (Card(memory_mb, SQUARE),)
    assert Cards(own=4000, planned=other).larger(SQUARE) is more
    assert Cards(own=4000, alive=other).marks.alive == (SQUARE if more else 0)
    assert (outdone(memory_mb) > 4000) is more


@pytest.mark.parametrize(
    ("timeout_s", "starting_s", "aged_s"), [(3600.0, STARTING_S, AGED_S), (300.0, 75.0, AGED_S), (60.0, 15.0, 15.0)]
)
def test_a_mark_is_lifted_while_the_job_has_time_left(timeout_s: float, starting_s: float, aged_s: float) -> None:
    marks = cards_of(a_placement(4), (a_placement(11),), timeout_s).marks
    assert (marks.coming_s, marks.rest_s) == (starting_s, aged_s)


def test_no_news_are_not_told() -> None:
    assert Fortune(None).news is None
