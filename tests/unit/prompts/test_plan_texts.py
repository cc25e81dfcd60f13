"""Plans of what one row and one text do not say: schedules, blends, long prompts, concepts, weighting rules."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.domain.conditioning import Phase
from serve.domain.text import FIRST_CONCEPT_ID, EncodeUnit, LongPrompt, Sign, Syntax, TextRequest, Weighting
from serve.errors import InvalidRequest
from serve.prompts.concepts import ConceptFault, ConceptRef, Concepts
from serve.prompts.flats import Span
from serve.prompts.placing import MAX_CONTEXT
from serve.prompts.plan import MAX_UNITS, Planner, PromptPlan, TextPlan
from serve.prompts.tokenizers import PromptTokenizer

FIRST, SECOND, THIRD = "text_encoder", "text_encoder_2", "text_encoder_3"
REQUEST = TextRequest(model="m", prompt="", negative_prompt="", width=128, height=64, num_inference_steps=10)
LONG = "a red circle on a blue background, " * 20
FAMILIES = ["sd", "sdxl", "sdxl_refiner", "sd3", "flux", "pixart", "auraflow"]


def request(prompt: str, negative: str | None = None, **rest: object) -> TextRequest:
    return replace(REQUEST, prompt=prompt, negative_prompt=negative, **rest)  # type: ignore[arg-type]


def shape(text: TextPlan) -> tuple[int, ...]:
    return tuple(block.height for block in text.blocks)


def rows(text: TextPlan, block: int = 0, column: int = 0) -> list[EncodeUnit]:
    return [row.unit for row in text.blocks[block].columns[column].text.rows]


def plain_units(planner: Planner, *texts: str) -> set[str]:
    return {unit.key for text in texts for unit in planner.plan(request(text)).units}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_schedule_reads_the_units_of_its_texts(planners: Mapping[str, Planner], family: str) -> None:
    planner = planners[family]
    plan = planner.plan(request("a [red:blue:5] circle", "[x|y]"))
    expected = plain_units(planner, "a red circle", "a blue circle", "x", "y")
    assert {unit.key for unit in plan.units} == expected
    assert [text.field for text in plan.texts] == ["prompt"] * 2 + ["negative_prompt"] * 2
    assert [phase.first for phase in plan.phases] == [*range(10)]
    assert plan.phases[4:6] == (
        Phase(4, ((1.0, ((1.0, 0),)),), ((1.0, 2),)),
        Phase(5, ((1.0, ((1.0, 1),)),), ((1.0, 3),)),
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sweep",
    [
        [f"a (red:{0.5 + number / 10:g}) circle" for number in range(10)],
        [f'("a red circle", "a blue star").blend({number / 10:g}, {1 - number / 10:g})' for number in range(10)],
        [f"a [red:blue:{number + 1}] circle" for number in range(8)],
        [f"a [red:blue:{number}-{number + 2}] circle" for number in range(8)],
        [f"a red circle AND a blue star :{number / 10:g}" for number in range(1, 10)],
    ],
    ids=["weight", "blend", "switch", "ramp", "composition"],
)
@pytest.mark.parametrize("weighting", Weighting)
def test_a_sweep_asks_for_no_new_unit(
    planners: Mapping[str, Planner], family: str, sweep: list[str], weighting: Weighting
) -> None:
    """Weights of exactly 1 have no hidden rows under Compel's rule, and are left out of its sweep."""
    units = []
    for prompt in sweep:
        if not (weighting is Weighting.COMPEL and ":1)" in prompt):
            units.append(set(planners[family].plan(request(prompt, "blurry", weighting=weighting)).units))
    assert len(units) > 6
    assert all(each == units[0] for each in units)


def test_a_composition_has_a_mix_for_each_part(planner: Planner) -> None:
    plan = planner.plan(request("red AND blue :0.5", "green"))
    assert plan.composed == 2
    assert plan.phases == (Phase(0, ((1.0, ((1.0, 0),)), (0.5, ((1.0, 1),))), ((1.0, 2),)),)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_contexts_have_one_shape(planners: Mapping[str, Planner], family: str) -> None:
    """Those of PixArt where they are mixed: its denoiser hides what is missing."""
    plan = planners[family].plan(request(f"[red:{LONG}:0-5]", "blurry"))
    shapes = {shape(text) for text in plan.texts}
    if family == "pixart":
        assert len(shapes) == 2
        assert shape(plan.texts[0]) == shape(plan.texts[1]) > shape(plan.texts[2])
    else:
        assert len(shapes) == 1


def test_a_long_prompt_is_rows_and_the_short_ones_are_filled_up(planners: Mapping[str, Planner]) -> None:
    planner = planners["sdxl"]
    plan = planner.plan(request(LONG, "blurry"))
    prompt, negative = plan.texts
    assert plan.truncated == ()
    number = len(rows(prompt))
    assert number > 2
    assert shape(prompt) == shape(negative) == (77 * number,)
    (block,) = negative.blocks
    assert [column.fill for column in block.columns] == [number - 1] * 2
    (empty,) = (column.empty for column in block.columns[:1])
    assert empty is not None
    assert empty.key in plain_units(planner, " ")
    assert plan.signs[empty.key] is Sign.EMPTY
    assert [count.chunks for count in plan.tokens] == [number, number, 1, 1]
    assert [vector.rows[0].unit.token_ids for vector in prompt.vectors] == [rows(prompt, column=1)[0].token_ids]


def test_the_rows_of_a_long_prompt_are_units_of_their_own(planner: Planner) -> None:
    """A row is the same wherever it stands: another end of a prompt costs the rows that it changes."""
    head, tail = "a red circle, " * 18, "a blue star"
    (one,), (other,) = (planner.plan(request(head + end)).texts for end in (tail, "a green moon"))
    assert rows(one)[:-1] == rows(other)[:-1]
    assert rows(one)[-1] != rows(other)[-1]


def test_a_break_begins_a_row(planner: Planner) -> None:
    (text,) = planner.plan(request("a red circle BREAK a blue star")).texts
    assert {unit.key for unit in rows(text)} == plain_units(planner, "a red circle", "a blue star")


def test_flux_reads_a_long_prompt_with_t5_and_tells_what_its_clip_does_not(planners: Mapping[str, Planner]) -> None:
    plan = planners["flux"].plan(request("red, " * 100))
    (cut,) = plan.truncated
    assert cut.limit == 75
    counts = {count.role: (count.cut, count.chunks) for count in plan.tokens}
    assert counts[SECOND] == (0, 1)
    assert counts[FIRST][1] == 1
    whole = planners["flux"].plan(request("red, " * 100, long_prompt=LongPrompt.HIERARCHICAL))
    assert whole.truncated == ()
    (vector,) = whole.texts[0].vectors
    assert len(vector.rows) > 1
    assert sum(vector.shares) == pytest.approx(1.0)


@pytest.mark.parametrize("policy", [LongPrompt.HEAD, LongPrompt.TAIL, LongPrompt.HIERARCHICAL])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_some_policies_keep_a_context_of_one_row(
    planners: Mapping[str, Planner], family: str, policy: LongPrompt
) -> None:
    planner = planners[family]
    short = planner.plan(request("red", "blurry")).texts[0]
    plan = planner.plan(request(LONG * 4, "blurry", long_prompt=policy))
    assert {shape(text) for text in plan.texts} == {shape(short)}
    assert bool(plan.truncated) == (policy is not LongPrompt.HIERARCHICAL)


def test_windows_name_the_tokens_that_rows_share(planner: Planner) -> None:
    (text,) = planner.plan(request(", " * 130, long_prompt=LongPrompt.WINDOW)).texts
    (column,) = text.blocks[0].columns
    assert [(window.first, window.at, window.tokens) for window in column.windows] == [
        (0, 1, 75),
        (50, 1, 75),
        (100, 1, 30),
    ]
    (short,) = planner.plan(request(", " * 75, long_prompt=LongPrompt.WINDOW)).texts
    assert short == planner.plan(request(", " * 75)).texts[0]


def test_what_is_too_long_can_be_refused(planners: Mapping[str, Planner]) -> None:
    for field in ("prompt", "negative_prompt"):
        texts = {"prompt": "red", "negative_prompt": "blue"} | {field: LONG}
        with pytest.raises(InvalidRequest, match=rf"{field}: \d+ tokens are more than the 75 that .* reads"):
            planners["sd"].plan(replace(REQUEST, long_prompt=LongPrompt.ERROR, **texts))  # type: ignore[arg-type]


def test_a_conjunction_lies_below_one_another(planners: Mapping[str, Planner]) -> None:
    plan = planners["sd3"].plan(request('("red", "blue", "green").and(1, 1, 0.5)', "x"))
    tops = {(text.slot, tuple(block.top for block in text.blocks)) for text in plan.of("prompt")}
    assert tops == {(0, (0, 0)), (1, (77, 256)), (2, (154, 512))}
    assert {shape(text) for text in plan.texts} == {(231, 768)}
    assert [bool(text.vectors) for text in plan.of("prompt")] == [not text.slot for text in plan.of("prompt")]
    (negative,) = plan.of("negative_prompt")
    assert [column.fill for block in negative.blocks for column in block.columns] == [2, 2, 2]
    assert all(column.fill == 0 for text in plan.of("prompt") for block in text.blocks for column in block.columns), (
        "each place is filled by its own text"
    )


def test_below_the_last_place_follows_the_empty_text(planners: Mapping[str, Planner]) -> None:
    plan = planners["sd"].plan(request('("red", "blue").and()', "a BREAK b BREAK c"))
    assert {shape(text) for text in plan.texts} == {(231,)}
    assert [(text.slot, text.blocks[0].columns[0].fill) for text in plan.texts] == [(0, 0), (1, 1), (0, 0)]


def test_an_empty_negative_text_of_sdxl_is_zeros_in_the_steps_that_read_it(planners: Mapping[str, Planner]) -> None:
    plan = planners["sdxl"].plan(request("red", "[blurry:5]"))
    assert [text.zero for text in plan.of("negative_prompt")] == [True, False]


def test_texts_of_both_sides_are_counted_together(planner: Planner) -> None:
    def turns(number: int) -> str:
        return "[" + "|".join(map(str, range(100, 100 + number))) + "]"

    steps = {"num_inference_steps": 60}
    assert len(planner.plan(request(turns(40), turns(24), **steps)).texts) == 64
    with pytest.raises(InvalidRequest, match="negative_prompt: the steps make more than 64 texts") as raised:
        planner.plan(request(turns(40), turns(25), **steps))
    assert raised.value.param == "negative_prompt"


def test_contexts_that_no_device_could_hold_are_refused(planner: Planner) -> None:
    turns = "[" + "|".join(map(str, range(100, 160))) + "]"
    with pytest.raises(
        InvalidRequest, match=rf"prompt: its steps read 60 texts of \d+ tokens, and in all {MAX_CONTEXT}"
    ):
        planner.plan(request(turns + ", " * 600, num_inference_steps=60))


def test_more_rows_than_the_text_encoders_owe_anybody_are_refused(planner: Planner) -> None:
    """Sixty texts, each with ten groups of words that Compel's rule hides in turn."""
    prompt = "[" + "|".join(map(str, range(100, 160))) + "]" + "".join(f"(a:1.{digit}) b " for digit in range(1, 10))
    asked = request(prompt, num_inference_steps=60)
    assert len(planner.plan(asked).units) == 60
    with pytest.raises(
        InvalidRequest, match=f"rows of text encoders would be read for it, and at most {MAX_UNITS} are"
    ):
        planner.plan(replace(asked, weighting=Weighting.COMPEL))


def test_the_longest_text_of_a_field_is_counted_and_every_cut_is_told(planner: Planner) -> None:
    plan = planner.plan(request("[red:, , ,:5]" + ", " * 75, long_prompt=LongPrompt.HEAD))
    (count,) = plan.tokens
    assert (count.used, count.cut) == (75, 3)
    assert [(cut.tokens, cut.text) for cut in plan.truncated][-1] == (78, ", , ,")
    assert len(plan.truncated) == 2


def test_plain_text_has_no_syntax(planner: Planner) -> None:
    plan = planner.plan(request("(a:1.5) AND [b|c]", syntax=Syntax.PLAIN))
    (text,) = plan.texts
    assert text.flat == (Span("(a:1.5) AND [b|c]", 1.0),)


def test_compels_syntax_says_the_same(planner: Planner) -> None:
    ours = planner.plan(request("a (red:1.5) circle"))
    compel = planner.plan(request("a (red)1.5 circle", syntax=Syntax.COMPEL))
    assert ours.units == compel.units
    assert ours.reads[0].weights == compel.reads[0].weights


@pytest.mark.parametrize("family", FAMILIES)
def test_compels_rule_needs_the_empty_row_and_rows_without_the_words(
    planners: Mapping[str, Planner], family: str
) -> None:
    planner = planners[family]
    plain = planner.plan(request("a red circle"))
    for weight in (0.5, 1.5):
        plan = planner.plan(request(f"a (red:{weight}) circle", weighting=Weighting.COMPEL))
        extra = [unit for unit in plan.units if unit not in plain.units]
        contexts = sum(len(block.columns) for block in plan.texts[0].blocks)
        assert len(extra) == 2 * contexts
        assert all(unit.hidden for unit in extra[1::2])
    assert planner.plan(request("a (red:1.5) circle")).units == plain.units
    assert planner.plan(request("a red circle", weighting=Weighting.COMPEL)).units == plain.units


class Shelf:
    """Concepts that are held in memory."""

    def __init__(self, **held: Mapping[str, ConceptRef]) -> None:
        self.held = held

    def find(self, name: str) -> Mapping[str, ConceptRef] | None:
        if name == "wide":
            raise ConceptFault("<wide> has 768 values where the text encoder has 1024")
        return self.held.get(name)

    def names(self) -> frozenset[str]:
        return frozenset(self.held)


CAT = {FIRST: ConceptRef("cat-l", 2), SECOND: ConceptRef("cat-g", 3)}


@pytest.fixture
def with_cat(planner_with: Callable[[str, Concepts], Planner]) -> Planner:
    return planner_with("sdxl", Shelf(cat=CAT, my_dog={FIRST: ConceptRef("dog-l", 1)}))


def test_a_concept_has_vectors_of_its_own_for_each_encoder(with_cat: Planner) -> None:
    (text,) = with_cat.plan(request("a <cat>")).texts
    concepts = {read.role: read.unit.concepts for read in text.reads}
    assert concepts == {FIRST: ("cat-l",), SECOND: ("cat-g",)}
    vectors = {read.role: sum(token >= FIRST_CONCEPT_ID for token in read.unit.token_ids) for read in text.reads}
    assert vectors == {FIRST: 2, SECOND: 3}


def test_a_bare_word_that_is_a_concepts_name_stands_for_it(with_cat: Planner) -> None:
    assert with_cat.plan(request("a cat, my_dog")).units == with_cat.plan(request("a <cat>, <my_dog>")).units
    for other in ("a cats", "a my_dogs", "a Cat", "a my dog", "a cat-like"):
        assert not any(unit.concepts for unit in with_cat.plan(request(other)).units)
    plain = with_cat.plan(request("a cat", syntax=Syntax.PLAIN))
    assert not any(unit.concepts for unit in plain.units)


def test_an_encoder_without_vectors_reads_nothing_in_a_concepts_place(with_cat: Planner) -> None:
    plan = with_cat.plan(request("a <my_dog> circle"))
    second = {read.unit for read in plan.reads if read.role == SECOND}
    assert second == {read.unit for read in with_cat.plan(request("a circle")).reads if read.role == SECOND}


def test_a_concept_that_no_file_defines_is_refused_with_its_place(with_cat: Planner) -> None:
    for field, text in (("prompt", "a (red <cta>:1.2)"), ("negative_prompt", "x, <cta>")):
        with pytest.raises(InvalidRequest) as raised:
            with_cat.plan(replace(REQUEST, **{field: text}))  # type: ignore[arg-type]
        place = text.index("<") + 1
        assert raised.value.message == f"{field}: character {place}: no concept is named <cta>; there is <cat>"
        assert raised.value.param == field


def test_a_concept_that_does_not_fit_the_model_is_refused(with_cat: Planner) -> None:
    with pytest.raises(InvalidRequest, match="prompt: character 3: <wide> has 768 values"):
        with_cat.plan(request("a <wide>"))
    assert with_cat.plan(request("wide")).units


def test_the_concepts_of_pixart_keep_their_capitals(planner_with: Callable[[str, Concepts], Planner]) -> None:
    planner = planner_with("pixart", Shelf(Cat={FIRST: ConceptRef("cat-t5", 1)}))
    (unit,) = planner.plan(request("A <Cat> On Blue")).units
    assert unit.concepts == ("cat-t5",)
    assert planner.plan(request("a Cat on blue")).units == (unit,)


PROMPTS = st.sampled_from(
    [
        "red",
        "a (red:1.3) BREAK blue",
        LONG,
        "[red:blue:4]",
        "[a|b|c]",
        "[red:blue star, moon:2-7]",
        '("red", "blue").blend(0.3, 0.7)',
        '("red", "a, b").and(1, 0.5)',
        "red AND blue :0.4",
        "",
    ]
)


@settings(deadline=None, max_examples=40)
@given(prompt=PROMPTS, negative=PROMPTS.filter(lambda text: "AND" not in text), policy=st.sampled_from(LongPrompt))
def test_plans_are_whole(planners: Mapping[str, Planner], prompt: str, negative: str, policy: LongPrompt) -> None:
    """Whatever is asked for: phases read texts that there are, and rows fit into their blocks."""
    for family in FAMILIES:
        asked = request(prompt, negative, long_prompt=policy, num_inference_steps=9)
        try:
            plan = planners[family].plan(asked)
        except InvalidRequest:
            assert policy is LongPrompt.ERROR
            continue
        assert plan == planners[family].plan(asked)
        whole(plan)


def whole(plan: PromptPlan) -> None:
    read = {index for phase in plan.phases for _, mix in phase.positive for _, index in mix}
    negative = {index for phase in plan.phases for _, index in phase.negative or ()}
    assert read | negative == set(range(len(plan.texts)))
    assert {plan.texts[index].field for index in read} == {"prompt"}
    assert {plan.texts[index].field for index in negative} == {"negative_prompt"}
    assert len({len(phase.positive) for phase in plan.phases}) == 1
    for text in plan.texts:
        for block in text.blocks:
            for column in block.columns:
                lengths = [len(row.unit.token_ids) for row in column.text.rows]
                height = max(lengths) if column.shares else sum(lengths)
                filled = column.fill * len(column.empty.token_ids) if column.empty else 0
                assert block.top + height + filled <= block.height
    for mixes in ((mix for _, mix in phase.positive) for phase in plan.phases):
        for mix in mixes:
            assert len({shape(plan.texts[index]) for _, index in mix if not plan.texts[index].zero}) <= 1


def test_rows_of_a_window_are_those_of_chunks_for_short_text(planner: Planner, tokenizer: PromptTokenizer) -> None:
    short = "a red circle"
    plans = [planner.plan(request(short, "x", long_prompt=policy)) for policy in LongPrompt]
    assert all(plan == plans[0] for plan in plans)
    assert rows(plans[0].texts[0])[0].token_ids == tokenizer.row(tokenizer.tokenize(short).ids, 77)
