"""What a plan's texts come to with a real encoder: the shipped model's."""

from collections.abc import Callable

import pytest
import torch

from serve.domain.conditioning import Schedule
from serve.domain.text import LongPrompt, TextRequest
from serve.encoders.codec import pack
from serve.encoders.compose import compose
from serve.encoders.export import conditioning_at
from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import register
from serve.models.folder import SHIPPED, check_folder
from serve.prompts.plan import Planner
from serve.settings.tree import Settings

STEPS = 10
Read = Callable[..., Schedule]


@pytest.fixture(scope="module")
def planner_and_tower(tmp_path_factory: pytest.TempPathFactory) -> tuple[Planner, TextTower]:
    model = check_folder(SHIPPED, "shapes", text_only=True)
    registry = register([model], Settings(data_dir=tmp_path_factory.mktemp("data")))
    return Planner(model, registry.sources("shapes")), TextTower.load(registry.encoders[0], "cpu")


@pytest.fixture
def read(planner_and_tower: tuple[Planner, TextTower]) -> Read:
    planner, tower = planner_and_tower

    def schedule(prompt: str, negative: str | None = None, policy: LongPrompt = LongPrompt.CHUNK) -> Schedule:
        request = TextRequest(
            model="shapes",
            prompt=prompt,
            negative_prompt=negative,
            width=64,
            height=64,
            num_inference_steps=STEPS,
            long_prompt=policy,
        )
        plan = planner.plan(request)
        outputs = [tower.encode([Row.of(unit, tower.outputs)])[0][unit.output] for unit in plan.units]
        return compose(plan, {unit.key: pack(value) for unit, value in zip(plan.units, outputs, strict=True)})

    return schedule


def at(schedule: Schedule, step: int = 0) -> torch.Tensor:
    return conditioning_at(schedule, step).positive


def test_what_a_break_parts_is_what_each_part_is_alone(read: Read) -> None:
    both = at(read("a red circle BREAK a blue (star:1.3)"))
    assert torch.equal(both, torch.cat([at(read("a red circle")), at(read("a blue (star:1.3)"))]))


def test_a_negative_text_is_filled_up_with_the_empty_one(read: Read) -> None:
    negative = conditioning_at(read("a red circle BREAK a blue star", "blurry"), 0).negative
    assert negative is not None
    assert torch.equal(negative, torch.cat([at(read("blurry")), at(read(" "))]))


def test_and_is_the_embeddings_below_one_another(read: Read) -> None:
    red, blue, empty = at(read("red")), at(read("a blue star")), at(read(""))
    whole = at(read('("red", "a blue star").and(1, 0.25)'))
    assert torch.allclose(whole, torch.cat([red, empty + 0.25 * (blue - empty)]), atol=1e-6)


def test_parts_of_and_may_change_with_the_steps(read: Read) -> None:
    changing = read(r'("[red:green:5]", "(\"a\", \"b\").blend(0.25, 0.75)").and()')
    a, b = at(read("a")), at(read("b"))
    for step, first in ((4, "red"), (5, "green")):
        assert torch.allclose(at(changing, step), torch.cat([at(read(first)), 0.25 * a + 0.75 * b]), atol=1e-6)


def test_a_switch_reads_what_each_text_is_alone(read: Read) -> None:
    switched = read("a [red:blue:5] circle")
    assert torch.equal(at(switched, 4), at(read("a red circle")))
    assert torch.equal(at(switched, 5), at(read("a blue circle")))


def test_a_ramp_is_a_straight_line_between_two_texts(read: Read) -> None:
    ramp, red, blue = read("[red:blue:2-6] circle"), at(read("red circle")), at(read("blue circle"))
    for step, share in ((0, 0.0), (2, 0.0), (3, 0.25), (5, 0.75), (6, 1.0), (9, 1.0)):
        assert torch.allclose(at(ramp, step), (1 - share) * red + share * blue, atol=1e-6)


LONG = "a red circle, " * 40


def test_windows_read_more_of_what_stands_before(read: Read) -> None:
    """Their first row begins as chunks do; where rows overlap, both have the same."""
    windows, head = at(read(LONG, policy=LongPrompt.WINDOW)), at(read(LONG, policy=LongPrompt.HEAD))
    assert torch.equal(windows[:51], head[:51])
    assert not torch.allclose(windows[51:76], head[51:76], atol=1e-3)
    assert torch.equal(windows[51:76], windows[77 + 1 : 77 + 26])


def test_a_hierarchical_context_is_the_mean_of_the_chunks_by_tokens(read: Read) -> None:
    whole = at(read("a red circle BREAK a blue star, a moon", policy=LongPrompt.HIERARCHICAL))
    rows = {text: at(read(text)) for text in ("a red circle", "a blue star, a moon")}
    counted = {"a red circle": 3, "a blue star, a moon": 6}
    expected = sum(rows[text] * number for text, number in counted.items()) / 9  # type: ignore[operator]
    assert whole.shape == (77, rows["a red circle"].shape[1])
    assert torch.allclose(whole, expected, atol=1e-6)


def test_a_tail_is_what_the_last_words_are_alone(read: Read) -> None:
    tail = at(read(", " * 30 + "; " * 75, policy=LongPrompt.TAIL))
    assert torch.equal(tail, at(read("; " * 75)))
