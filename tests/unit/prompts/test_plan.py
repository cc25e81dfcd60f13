import time
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.domain.conditioning import Phase
from serve.domain.orders import ImageRequest
from serve.domain.text import LongPrompt, Sign, TextRequest
from serve.errors import InvalidRequest
from serve.models.folder import ModelFolder
from serve.prompts.plan import Planner, PromptPlan, UnitRead
from serve.prompts.tokenizers import PromptTokenizer

REQUEST = TextRequest(model="m", prompt="a red circle", negative_prompt="", width=128, height=64)


def request(prompt: str, negative: str | None = "", **rest: object) -> TextRequest:
    return replace(REQUEST, prompt=prompt, negative_prompt=negative, **rest)


def outputs(plan: PromptPlan, negative: bool = False) -> list[tuple[str, str]]:
    return [(read.role, read.unit.output) for read in reads(plan, negative)]


def reads(plan: PromptPlan, negative: bool = False) -> tuple[UnitRead, ...]:
    """Of the one text of a side."""
    (text,) = plan.of("negative_prompt" if negative else "prompt")
    return text.reads


def test_plain_prompt_is_one_row_a_side(planner: Planner, tokenizer: PromptTokenizer) -> None:
    plan = planner.plan(request("a red circle", "blurry"))
    assert plan.units == tuple(read.unit for read in (*reads(plan), *reads(plan, negative=True)))
    assert [unit.token_ids for unit in plan.units] == [
        tokenizer.row(tokenizer.tokenize(text).ids, 77) for text in ("a red circle", "blurry")
    ]
    assert [read.weights for read in reads(plan)] == [None]
    assert plan.truncated == ()
    assert plan.phases == (Phase(0, ((1.0, ((1.0, 0),)),), ((1.0, 1),)),)
    assert (plan.composed, plan.guided) == (1, True)


FIRST, SECOND, THIRD = "text_encoder", "text_encoder_2", "text_encoder_3"
READ = {
    "sd": [(FIRST, "hidden")],
    "sdxl": [(FIRST, "skip:1"), (SECOND, "skip:1"), (SECOND, f"projected:of-{SECOND}")],
    "sd3": [
        (FIRST, "skip:1"),
        (SECOND, "skip:1"),
        (THIRD, "hidden"),
        (FIRST, f"projected:of-{FIRST}"),
        (SECOND, f"projected:of-{SECOND}"),
    ],
    "flux": [(SECOND, "hidden"), (FIRST, "pooled")],
    "sdxl_refiner": [(SECOND, "skip:1"), (SECOND, f"projected:of-{SECOND}")],
    "pixart": [(FIRST, "hidden")],
    "auraflow": [(FIRST, "hidden")],
}
TIME_IDS = {
    "sdxl": ((64, 128, 0, 0, 64, 128), None),
    "sdxl_refiner": ((64, 128, 0, 0, 6.0), (64, 128, 0, 0, 2.5)),
}


@pytest.mark.parametrize("family", READ)
def test_each_family_reads_its_outputs(planners: Mapping[str, Planner], family: str) -> None:
    plan = planners[family].plan(request("red", "blue"))
    assert outputs(plan) == outputs(plan, negative=True) == READ[family]
    assert len(plan.units) == 2 * len(READ[family])
    assert (plan.time_ids, plan.negative_time_ids) == TIME_IDS.get(family, (None, None))
    assert plan.zero_rows == 0
    assert planners[family].plan(request("red", None)).negative_time_ids is None


def test_outputs_of_one_row_share_its_ids(planners: Mapping[str, Planner]) -> None:
    """So that one forward gives them all."""
    for prompt in ("a (red:1.2) circle", "a (red:1.2) circle BREAK on blue"):
        plan = planners["sd3"].plan(request(prompt, None))
        for role in (FIRST, SECOND):
            by_output: dict[str, list[tuple[int, ...]]] = {}
            for read in reads(plan):
                if read.role == role:
                    by_output.setdefault(read.unit.output, []).append(read.unit.token_ids)
            context, vector = by_output.values()
            assert vector == context[:1]


def test_an_empty_negative_prompt_of_sdxl_is_zeros(planners: Mapping[str, Planner]) -> None:
    for empty in ("", "()"):
        plan = planners["sdxl"].plan(request("red", empty))
        assert [text.zero for text in plan.texts] == [False, True]
        assert plan.units == planners["sdxl"].plan(request("red", None)).units
    for prompt, negative in (("red", " "), ("", "blue")):
        assert not any(text.zero for text in planners["sdxl"].plan(request(prompt, negative)).texts)
    for name in ("sd", "sdxl-encoded-empty", "sdxl_refiner", "sd3", "flux", "pixart"):
        assert reads(planners[name].plan(request("red", "")), negative=True)


def test_t5_left_out_is_zeros(planners: Mapping[str, Planner]) -> None:
    asked = planners["sd3"].plan(request("red", "blue", use_t5=False))
    lacking = planners["sd3-without-t5"].plan(request("red", "blue"))
    assert asked.zero_rows == lacking.zero_rows == 256
    assert asked.units == lacking.units
    assert {read.role for read in asked.reads} == {FIRST, SECOND}
    shorter = planners["sd3-without-t5"].plan(request("red", max_sequence_length=100))
    assert shorter.zero_rows == 100


@pytest.mark.parametrize(("family", "role", "default"), [("sd3", THIRD, 256), ("flux", SECOND, 512)])
def test_length_of_a_t5_row(planners: Mapping[str, Planner], family: str, role: str, default: int) -> None:
    for length, expected in ((None, default), (512, 512), (77, 77), (1, 1)):
        plan = planners[family].plan(request("red", max_sequence_length=length))
        assert [len(read.unit.token_ids) for read in reads(plan) if read.role == role] == [expected]
    for length in (0, -1, 513):
        with pytest.raises(InvalidRequest, match="max_sequence_length: must be between 1 and 512") as raised:
            planners[family].plan(request("red", max_sequence_length=length))
        assert raised.value.param == "max_sequence_length"


def test_a_context_of_auraflow_is_filled_up_with_zeros(planners: Mapping[str, Planner]) -> None:
    for length, expected in ((None, 256), (40, 40)):
        plan = planners["auraflow"].plan(request("Red circle", max_sequence_length=length))
        (read,) = reads(plan)
        assert len(read.unit.token_ids) < 20
        assert plan.context_tokens == expected
    assert read.unit != reads(planners["auraflow"].plan(request("red circle")))[0].unit, "capitals are read"
    assert planners["pixart"].plan(request("red")).context_tokens == 0


@pytest.mark.parametrize(("name", "most"), [("pixart", 300), ("pixart-alpha", 120)])
def test_a_row_of_pixart_ends_with_its_text(planners: Mapping[str, Planner], name: str, most: int) -> None:
    """Nobody looks at its padding, and the longest text is the pipeline's, not the family's."""
    planner = planners[name]
    for prompt, length, expected in (
        ("red circle", None, 3),
        ("red circle", 2, 2),
        ("", None, 1),
        ("red " * 400, None, most),
    ):
        plan = planner.plan(request(prompt, max_sequence_length=length, long_prompt=LongPrompt.HEAD))
        (read,) = reads(plan)
        assert len(read.unit.token_ids) == expected
        assert read.unit.token_ids[-1] == 1, "the end of text"
        assert bool(plan.truncated) == (expected < len(prompt.split()) + 1)
    assert planner.plan(request(" a RED\nCircle ")).units == planner.plan(request("a red\ncircle")).units
    (weighted,) = reads(planner.plan(request("RED (Circle:1.5)")))
    assert weighted.unit == reads(planner.plan(request("red circle")))[0].unit
    assert weighted.weights == (1.0, 1.5, 1.0)
    with pytest.raises(InvalidRequest, match=f"max_sequence_length: must be between 1 and {most}"):
        planner.plan(request("red", max_sequence_length=most + 1))


@pytest.mark.parametrize(
    ("family", "field", "value", "reason"),
    [
        ("sd", "max_sequence_length", 77, "sd has no T5"),
        ("sdxl", "max_sequence_length", 77, "sdxl has no T5"),
        ("sd", "use_t5", False, "sd has no T5"),
        ("sdxl", "use_t5", False, "sdxl has no T5"),
        ("flux", "use_t5", False, "flux can't do without its T5"),
        ("flux", "clip_skip", 1, "flux reads no layers of CLIP"),
        ("flux", "clip_skip", 0, "flux reads no layers of CLIP"),
        ("pixart", "clip_skip", 1, "pixart reads no layers of CLIP"),
        ("pixart", "use_t5", False, "pixart can't do without its T5"),
        ("auraflow", "use_t5", False, "auraflow can't do without its T5"),
        ("auraflow", "max_sequence_length", 257, "must be between 1 and 256"),
        ("sdxl_refiner", "use_t5", False, "sdxl_refiner has no T5"),
        ("sd", "clip_skip", 3, "must be between 0 and 2"),
        ("sd", "clip_skip", -1, "must be between 0 and 2"),
        ("sdxl", "clip_skip", 2, "must be between 0 and 1"),
        ("sd3", "clip_skip", 2, "must be between 0 and 1"),
    ],
)
def test_what_a_model_can_not_do_names_the_field(
    planners: Mapping[str, Planner], family: str, field: str, value: object, reason: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        planners[family].plan(request("red", **{field: value}))
    assert raised.value.param == field
    assert raised.value.message == f"{field}: {reason}"


def test_clip_skip_reads_an_earlier_layer_for_the_prompt_alone(planners: Mapping[str, Planner]) -> None:
    """As the stock pipelines: a negative prompt is read from the default layer."""
    skipped = {
        "sd": [(FIRST, "skip:1:norm")],
        "sdxl": [(FIRST, "skip:2"), (SECOND, "skip:2"), *READ["sdxl"][2:]],
        "sd3": [(FIRST, "skip:2"), (SECOND, "skip:2"), *READ["sd3"][2:]],
    }
    for family, expected in skipped.items():
        planner = planners[family]
        plan = planner.plan(request("red", "blue", clip_skip=1))
        assert outputs(plan) == expected
        assert outputs(plan, negative=True) == READ[family]
        assert planner.plan(request("red", "blue", clip_skip=0)) == planner.plan(request("red", "blue"))


@pytest.mark.parametrize("family", READ)
def test_weights_change_no_unit(planners: Mapping[str, Planner], family: str) -> None:
    plain, weighted, of_one = (
        planners[family].plan(request(text, "b"))
        for text in ("a red circle", "a (red:1.5) [circle]", "(a:1) ([red]) circle")
    )
    assert plain.units == weighted.units
    assert [unit.key for unit in plain.units] == [unit.key for unit in weighted.units]
    assert of_one == plain
    for read in reads(weighted):
        is_vector = read.unit.output.startswith(("pooled", "projected"))
        assert (read.weights is None) == is_vector
        assert is_vector or len(read.weights) == len(read.unit.token_ids)


def test_weights_lie_on_their_tokens(planner: Planner, tokenizer: PromptTokenizer) -> None:
    (read,) = reads(planner.plan(request("a (red:1.5) circle")))
    before, inside = len(tokenizer.tokenize("a ").ids), len(tokenizer.tokenize("red").ids)
    expected = [1.0] * (1 + before) + [1.5] * inside
    assert list(read.weights) == expected + [1.0] * (77 - len(expected))


def image_request(guidance: float) -> ImageRequest:
    return ImageRequest(
        model="m",
        prompt="red",
        negative_prompt="blue AND green",
        width=128,
        height=128,
        num_inference_steps=1,
        guidance_scale=guidance,
        seed=0,
    )


def test_no_guidance_encodes_no_negative(planner: Planner) -> None:
    plan = planner.plan(image_request(1.0).text)
    assert not plan.guided
    assert plan.units == tuple(read.unit for read in reads(plan))
    with pytest.raises(InvalidRequest, match="negative_prompt: AND is for the prompt alone"):
        planner.plan(image_request(5.0).text)


def test_equal_sides_are_one_unit(planner: Planner) -> None:
    assert len(planner.plan(request("", "")).units) == 1


def test_signs_tell_who_reads_a_unit(planners: Mapping[str, Planner]) -> None:
    def signs(planner: Planner, prompt: str, negative: str | None) -> list[Sign]:
        plan = planner.plan(request(prompt, negative))
        assert list(plan.signs) == [unit.key for unit in plan.units]
        return list(plan.signs.values())

    sd = planners["sd"]
    assert signs(sd, "red", "blue") == [Sign.POSITIVE, Sign.NEGATIVE]
    assert signs(sd, "red", "") == [Sign.POSITIVE, Sign.EMPTY]
    assert signs(sd, "red", " () ") == [Sign.POSITIVE, Sign.EMPTY]
    assert signs(sd, "", "blue") == [Sign.EMPTY, Sign.NEGATIVE]
    assert signs(sd, "red", "red") == [Sign.POSITIVE]
    assert signs(planners["sdxl"], "red", "") == [Sign.POSITIVE] * 3
    assert signs(planners["flux"], "red", "") == [Sign.POSITIVE] * 2 + [Sign.EMPTY] * 2


@pytest.mark.parametrize("family", READ)
def test_the_salt_is_in_every_unit(planners: Mapping[str, Planner], family: str) -> None:
    plain, salted = (planners[family].plan(request("red", "blue", salt=salt)) for salt in ("", "tenant"))
    assert {unit.salt for unit in salted.units} == {"tenant"}
    assert not {unit.key for unit in plain.units} & {unit.key for unit in salted.units}
    assert tuple(replace(unit, salt="") for unit in salted.units) == plain.units


def test_truncation_tells_the_text_that_was_cut(planner: Planner, tokenizer: PromptTokenizer) -> None:
    head = "red " * (75 // len(tokenizer.tokenize("red").ids))
    plan = planner.plan(request(head + "Blue (STAR:1.2), moon", "green", long_prompt=LongPrompt.HEAD))
    (cut,) = plan.truncated
    assert (cut.field, cut.limit) == ("prompt", 75)
    assert cut.text == "Blue STAR, moon"
    assert cut.tokens == 75 + len(tokenizer.tokenize("Blue STAR, moon").ids)
    (read,) = reads(plan)
    assert len(read.unit.token_ids) == 77


def test_truncation_inside_a_weighted_span_and_a_word(planner: Planner, tokenizer: PromptTokenizer) -> None:
    text = "x" * 3 + "y" * 200
    plan = planner.plan(request(f"({text}:1.3)", "n", long_prompt=LongPrompt.HEAD))
    (cut,) = plan.truncated
    start = tokenizer.tokenize(text).starts[75]
    assert cut.text == text[start:]
    assert reads(plan)[0].weights[1:76] == (1.3,) * 75


def test_both_sides_are_told(planner: Planner) -> None:
    plan = planner.plan(request("red " * 100, "blue " * 100, long_prompt=LongPrompt.HEAD))
    assert [cut.field for cut in plan.truncated] == ["prompt", "negative_prompt"]


def test_every_encoder_tells_its_own_cut(planners: Mapping[str, Planner], models: Mapping[str, ModelFolder]) -> None:
    text = "red " * 70 + "blue " * 40
    plan = planners["sd3"].plan(request(text, "n", max_sequence_length=100, long_prompt=LongPrompt.HEAD))
    names = {part.role: part.name for part in models["sd3"].text}
    assert [(cut.encoder, cut.field, cut.tokens, cut.limit, cut.text) for cut in plan.truncated] == [
        (names[FIRST], "prompt", 110, 75, ("blue " * 35).strip()),
        (names[SECOND], "prompt", 110, 75, ("blue " * 35).strip()),
        (names[THIRD], "prompt", 110, 99, ("blue " * 11).strip()),
    ]


def test_tokens_are_counted_per_encoder(planners: Mapping[str, Planner]) -> None:
    plan = planners["flux"].plan(request("red " * 80 + "緑", "blue", max_sequence_length=512))
    counts = {(count.field, count.role): (count.used, count.cut, count.unknown) for count in plan.tokens}
    clip_words = counts["prompt", FIRST][1] + 75
    assert clip_words > 80
    assert counts["prompt", FIRST] == (75, clip_words - 75, 0)
    assert counts["prompt", SECOND] == (82, 0, 1)  # "緑" is a space and an unknown
    assert counts["negative_prompt", FIRST][:2] == counts["negative_prompt", SECOND][:2] == (1, 0)


def test_seventy_five_tokens_are_not_truncated(planner: Planner, tokenizer: PromptTokenizer) -> None:
    assert len(tokenizer.tokenize(",").ids) == 1
    assert planner.plan(request(", " * 75, long_prompt=LongPrompt.HEAD)).truncated == ()
    (cut,) = planner.plan(request(", " * 76, long_prompt=LongPrompt.HEAD)).truncated
    assert (cut.tokens, cut.text) == (76, ",")


@pytest.mark.parametrize("family", READ)
def test_errors_name_the_side(planners: Mapping[str, Planner], family: str) -> None:
    for field in ("prompt", "negative_prompt"):
        with pytest.raises(InvalidRequest) as raised:
            planners[family].plan(replace(REQUEST, **{field: "[b:c:60]"}))
        assert raised.value.param == field


@settings(deadline=None)
@given(words=st.lists(st.sampled_from(["red", "(blue:1.5)", "[x]", "😀", "star's", ",", "qqq"]), max_size=120))
def test_rows_and_reports_always_fit(planner: Planner, tokenizer: PromptTokenizer, words: list[str]) -> None:
    def ids(text: str) -> tuple[int, ...]:
        return tokenizer.tokenize(text).ids

    prompt = " ".join(words)
    plan = planner.plan(request(prompt, long_prompt=LongPrompt.HEAD))
    (read,) = reads(plan)
    assert len(read.unit.token_ids) == len(read.weights or read.unit.token_ids) == 77
    assert read.unit.token_ids[0] == tokenizer.before[0]
    assert plan == planner.plan(request(prompt, long_prompt=LongPrompt.HEAD))
    for cut in plan.truncated:
        assert cut.tokens > cut.limit == 75
        assert cut.text
        assert ids(cut.text)[-1] == ids(prompt.translate(str.maketrans("", "", "()[]")).replace(":1.5", ""))[-1]


def test_planning_is_far_below_a_forward(planner: Planner) -> None:
    """About 0.2 ms on a laptop core; the bound is for a busy machine."""
    text = request("a (red:1.2) circle on a blue background, " * 8, "blurry, low quality")
    took = []
    for _ in range(50):
        started = time.perf_counter()
        planner.plan(text)
        took.append(time.perf_counter() - started)
    assert min(took) < 0.0015
