"""What a prompt comes to: rows, tokens, weights, steps and units as the planner has them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.text_models import flux_folder, sd3_folder, sdxl_folder

from serve.analysis import Analysis, analysis
from serve.domain.text import LongPrompt, Syntax, TextRequest, Tier
from serve.models import SHIPPED, check_folder
from serve.prompts.concepts import ConceptRef
from serve.prompts.plan import Planner, Source


class Cats:
    """A concept of three vectors for every role."""

    def find(self, name: str) -> Mapping[str, ConceptRef] | None:
        roles = ("text_encoder", "text_encoder_2", "text_encoder_3")
        return {role: ConceptRef(f"cat-{role}", 3) for role in roles} if name == "my-cat" else None

    def names(self) -> frozenset[str]:
        return frozenset({"my-cat"})


@pytest.fixture(scope="module")
def planners(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Planner]:
    root = tmp_path_factory.mktemp("models")
    folders: Iterator[tuple[str, Path]] = iter(
        [
            ("shapes", SHIPPED),
            ("sdxl", sdxl_folder(root / "sdxl")),
            ("sd3", sd3_folder(root / "sd3")),
            ("flux", flux_folder(root / "flux")),
        ]
    )
    made = {}
    for name, folder in folders:
        model = check_folder(folder, name, text_only=True)
        sources = {
            part.role: Source(fingerprint=part.role, name=f"the {part.role}", part=part, projection=None)
            for part in model.text
        }
        made[name] = Planner(model, sources, Cats())
    return made


def look(planner: Planner, prompt: str, negative: str | None = None, steps: int = 20, **fields: Any) -> Analysis:
    request = TextRequest(
        model="m", prompt=prompt, negative_prompt=negative, width=64, height=64, num_inference_steps=steps, **fields
    )
    plan = planner.plan(request)
    tiers = dict.fromkeys((unit.key for unit in plan.units), Tier.ENCODED)
    return analysis(request, planner, plan, tiers, guided=True)


def spelled(found: Analysis, reading: int = 0) -> list[str]:
    return ["".join(token.text for token in row.tokens).strip() for row in found.readings[reading].rows]


def test_each_encoder_s_tokens_with_their_weights(planners: Mapping[str, Planner]) -> None:
    for planner in planners.values():
        found = look(planner, "a (red:1.5) circle", "a [star]")
        roles = list(planner.tokenizers)
        assert [(each.field, each.role) for each in found.readings] == [
            *(("prompt", role) for role in roles),
            *(("negative_prompt", role) for role in roles),
        ]
        for reading in found.readings[: len(roles)]:
            weights = {token.text.strip(): token.weight for row in reading.rows for token in row.tokens}
            assert " ".join(" ".join(weights).split()).replace(" ", "") == "aredcircle"
            if reading.rows[0].unit in {unit.key for unit in found.units if unit.output not in ("pooled",)}:
                heavy = "".join(token.text for row in reading.rows for token in row.tokens if token.weight == 1.5)
                assert heavy.strip() == "red"


def test_a_long_text_is_told_row_by_row_and_what_is_cut(planners: Mapping[str, Planner]) -> None:
    long = ", ".join(["a red circle"] * 30)
    found = look(planners["shapes"], long)
    assert len(found.readings[0].rows) == found.tokens[0].chunks > 1
    assert sum(len(row.tokens) for row in found.readings[0].rows) == found.tokens[0].used
    assert found.truncated == ()
    cut = look(planners["shapes"], long, long_prompt=LongPrompt.HEAD)
    assert len(cut.readings[0].rows) == 1
    (gone,) = cut.truncated
    assert f"{spelled(cut)[0]} {gone.text}".replace(" ", "") == long.replace(" ", "")


def test_the_schedule_says_what_every_step_reads(planners: Mapping[str, Planner]) -> None:
    found = look(planners["shapes"], "a [red:blue:5] circle", "a star", steps=8)
    assert [(moment.first, moment.last) for moment in found.schedule] == [(0, 4), (5, 7)]
    texts = [found.texts[moment.positive[0].mix[0].text].text for moment in found.schedule]
    assert [text.split() for text in texts] == [["a", "red", "circle"], ["a", "blue", "circle"]]
    assert {found.texts[(moment.negative or ())[0].text].text for moment in found.schedule} == {"a star"}
    ramp = look(planners["shapes"], "a [red:blue:2-6] circle", steps=8)
    shares = [sum(share.share for share in moment.positive[0].mix) for moment in ramp.schedule]
    assert shares == pytest.approx([1.0] * len(shares))
    assert [step for moment in ramp.schedule for step in range(moment.first, moment.last + 1)] == list(range(8))


def test_a_composition_has_a_lane_for_each_part(planners: Mapping[str, Planner]) -> None:
    found = look(planners["shapes"], "a red circle AND a blue square :0.5", "")
    assert found.composed == 2
    (moment,) = found.schedule
    assert [lane.weight for lane in moment.positive] == [1.0, 0.5]


def test_texts_are_words_that_read_the_same(planners: Mapping[str, Planner]) -> None:
    planner = planners["shapes"]
    for prompt in (r"a (red:1.5) \(circle\) [blue]", "one BREAK two", "a (my-cat:1.2) on (a [mat:rug:4]:0.8)"):
        found = look(planner, prompt)
        for at, text in enumerate(found.texts):
            again = look(planner, text.text)
            rows = [row for reading in found.readings if reading.text == at for row in reading.rows]
            assert [row.unit for row in again.readings[0].rows] == [row.unit for row in rows]
            weights = [[token.weight for token in row.tokens] for row in rows]
            assert [[token.weight for token in row.tokens] for row in again.readings[0].rows] == [
                pytest.approx(each, abs=1e-4) for each in weights
            ]


def test_plain_brackets_are_told_as_text(planners: Mapping[str, Planner]) -> None:
    found = look(planners["shapes"], "a (red:1.5) circle", syntax=Syntax.PLAIN)
    assert found.texts[0].text == r"a \(red:1.5\) circle"


def test_learned_vectors_are_told_by_name(planners: Mapping[str, Planner]) -> None:
    for name in ("shapes", "sd3"):
        found = look(planners[name], "a <my-cat> on a my-cat")
        for reading in found.readings:
            learned = [token.text.strip() for row in reading.rows for token in row.tokens if token.concept]
            assert learned == [f"<my-cat> {n}/3" for n in (1, 2, 3)] * 2


def test_every_unit_has_its_place(planners: Mapping[str, Planner]) -> None:
    for planner in planners.values():
        found = look(planner, "a red circle", "a star")
        assert len({unit.key for unit in found.units}) == len(found.units) > 0
        assert {unit.encoder for unit in found.units} == {source.name for source in planner.sources.values()}
        rows = {row.unit for reading in found.readings for row in reading.rows}
        assert rows <= {unit.key for unit in found.units}
