"""Windows of forwards, on a tiny encoder, beside a process that takes a whole core."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import repeat

import pytest

from serve.bench.shapes import EncoderShape
from serve.bench.texts import random_row
from serve.bench.weights import encoder_of, random_encoder
from serve.bench.windows import DISTURBED, Budget, Series, Spare, in_turns
from serve.encoders.forward import TextTower
from serve.settings.pools import EncoderSettings

CLIP = EncoderShape(
    name="tiny-clip", kind="clip", width=64, layers=2, heads=2, head_width=32, feed_forward=128, vocab_size=1300
)
BUDGET = Budget(windows=3, window_s=0.3, longest_s=1.0)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextTower]:
    with random_encoder(CLIP, 0, tmp_path_factory.mktemp("encoder") / "clip") as part:
        yield TextTower.load(encoder_of(CLIP, part, EncoderSettings()), "cpu")


@pytest.fixture
def busy() -> Iterator[None]:
    """Another process that computes all the time; it has begun when this gives way."""
    script = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


def series(tower: TextTower, spare: Spare, taken: list[int] | None = None, name: int = 0) -> Series:
    def batches() -> Iterator[list[tuple[int, ...]]]:
        for rows in repeat([random_row(CLIP, 0, 0)]):
            if taken is not None:
                taken.append(name)
            yield rows

    return Series(tower, batches(), BUDGET, spare)


def test_a_disturbed_window_is_measured_again_and_told(tower: TextTower, busy: None) -> None:
    spare = Spare(2)
    one = series(tower, spare)
    in_turns([one])
    assert one.others > DISTURBED
    assert one.rows_per_s.count == BUDGET.windows
    assert not spare.take()


def test_sizes_take_turns(tower: TextTower) -> None:
    """Every window of the one lies between two of the other."""
    taken: list[int] = []
    both = [series(tower, Spare(0), taken, name) for name in (1, 2)]
    in_turns(both)
    runs = [name for at, name in enumerate(taken) if at == 0 or taken[at - 1] != name]
    assert runs == [1, 2] * (1 + BUDGET.windows)
    assert all(one.done for one in both)
