"""What clients say of their prompts becomes text: the same for the same seed, and stable when it is sent again."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.domain.text import Syntax
from serve.errors import InvalidRequest
from serve.prompts.parse import parse
from serve.settings.orders import ArmSettings, LimitSettings, TemplateSettings
from serve.wording import NewPrompt, Worded, arm_of, worded

LIMITS = LimitSettings()
TEMPLATES = {
    "portrait": TemplateSettings(text="a portrait of {subject}, {oil|ink}", negative_prompt="blurry {subject}"),
    "style": TemplateSettings(text="{prompt}, masterpiece"),
    "test": TemplateSettings(
        negative_prompt="dull",
        arms={
            "plain": ArmSettings(text="{prompt}"),
            "rich": ArmSettings(text="{prompt} in {place}", negative_prompt="grey", share=3),
        },
    ),
    "weights": TemplateSettings(text="(very {subject})++", syntax="compel"),
}


def word(seed: int = 0, steps: int = 20, **fields: Any) -> Worded:
    return worded(NewPrompt(**fields), TEMPLATES, LIMITS, seed=seed, num_inference_steps=steps)


def refused(param: str, **fields: Any) -> str:
    with pytest.raises(InvalidRequest) as error:
        word(**fields)
    assert error.value.param == param
    assert error.value.message.startswith(param)
    return error.value.message


def test_text_stays_as_it_was_written() -> None:
    for text in ("a (red:1.3) circle", "a (red circle [blue", " x  y ", "a { b }", r"a \{b\} \(c\)"):
        assert word(prompt=text, negative_prompt=text) == Worded(prompt=text, negative_prompt=text, syntax=Syntax.A1111)
    assert word(prompt="a").negative_prompt is None
    assert word(prompt="red++", prompt_syntax=Syntax.COMPEL).syntax is Syntax.COMPEL


def test_braces_of_a_plain_prompt_are_text() -> None:
    text = "a {red|blue} {thing}"
    assert word(prompt=text, prompt_syntax=Syntax.PLAIN).prompt == text
    refused("variables", prompt="a {thing}", prompt_syntax=Syntax.PLAIN, variables={"thing": "cat"})


def test_choices_are_the_seed_s_alone() -> None:
    texts = {seed: word(seed, prompt="a {red|green|blue} circle").prompt for seed in range(60)}
    assert {text.split()[1] for text in texts.values()} == {"red", "green", "blue"}
    assert texts == {seed: word(seed, prompt="a {red|green|blue} circle").prompt for seed in texts}


def test_a_template_is_filled_in() -> None:
    told = word(template="portrait", variables={"subject": "a cat"})
    assert told.prompt in ("a portrait of a cat, oil", "a portrait of a cat, ink")
    assert (told.negative_prompt, told.template, told.arm) == ("blurry a cat", "portrait", None)
    own = word(template="portrait", variables={"subject": "a cat"}, negative_prompt="no {subject}")
    assert own.negative_prompt == "no a cat"
    assert word(template="portrait", variables={"subject": "a cat"}, negative_prompt="").negative_prompt == ""


def test_a_template_takes_the_order_s_prompt_with_its_choices_and_variables() -> None:
    prompt = "a {red|blue} {thing}"
    told = {word(seed, template="style", prompt=prompt, variables={"thing": "cat"}).prompt for seed in range(30)}
    assert told == {"a red cat, masterpiece", "a blue cat, masterpiece"}
    assert word(template="style", variables={"prompt": "a cat"}).prompt == "a cat, masterpiece"


def test_a_template_has_a_syntax_of_its_own() -> None:
    told = word(template="weights", variables={"subject": "red"})
    assert (told.prompt, told.syntax) == ("(very red)++", Syntax.COMPEL)
    fields = {"template": "weights", "variables": {"subject": "red"}}
    assert word(**fields, prompt_syntax=Syntax.COMPEL) == told
    assert "compel" in refused("prompt_syntax", **fields, prompt_syntax=Syntax.A1111)


def test_arms_are_dealt_out_by_their_shares_and_can_be_named() -> None:
    dealt = Counter(arm_of("test", TEMPLATES["test"].arms, seed) for seed in range(4000))
    assert dealt["rich"] / 4000 == pytest.approx(0.75, abs=0.03)
    order = {"template": "test", "prompt": "a cat", "variables": {"place": "Rome"}}
    for seed in range(20):
        arm = arm_of("test", TEMPLATES["test"].arms, seed)
        assert word(seed, **order) == word(seed, **order, arm=arm), "a variable that only the other arm reads is fine"
    assert word(**order, arm="plain") == Worded(
        prompt="a cat", negative_prompt="dull", syntax=Syntax.A1111, template="test", arm="plain"
    )
    assert word(**order, arm="rich").prompt == "a cat in Rome"
    assert word(**order, arm="rich").negative_prompt == "grey"


def test_two_templates_deal_their_arms_out_independently() -> None:
    arms = {"a": ArmSettings(text="a"), "b": ArmSettings(text="b")}
    same = sum(arm_of("one", arms, seed) == arm_of("two", arms, seed) for seed in range(2000))
    assert same / 2000 == pytest.approx(0.5, abs=0.05)


def test_what_a_template_lacks_or_has_too_much_of_is_named() -> None:
    assert "subject" in refused("prompt", template="portrait")
    assert "portrait, style, test, weights" in refused("template", template="nowhere", prompt="a")
    assert "plain, rich" in refused("arm", template="test", arm="poor", prompt="a", variables={"place": "b"})
    refused("arm", template="style", arm="plain", prompt="a")
    refused("arm", prompt="a", arm="plain")
    assert "variables" in refused("prompt", template="portrait", prompt="a cat")
    refused("prompt", template="style", prompt=[{"text": "a"}])
    refused("variables.prompt", template="style", prompt="a", variables={"prompt": "b"})
    assert "{sbject}" in refused("variables.sbject", template="portrait", variables={"subject": "a", "sbject": "b"})
    refused("variables.subject", prompt="a cat", variables={"subject": "b"})
    refused("prompt", prompt="a {subject}")
    refused("prompt")


def test_a_variable_s_braces_are_text() -> None:
    told = word(template="style", variables={"prompt": "a {b|c} {d}"})
    assert parse(told.prompt) == parse(r"a \{b\|c\} \{d\}, masterpiece")


def test_pieces_become_words_of_the_same_meaning() -> None:
    told = word(prompt=[{"text": "a (sunset:1.2)", "weight": 0.7}, {"text": 'an "ocean"', "weight": 0.3}])
    assert parse(told.prompt) == parse(r'("a (sunset:1.2)", "an \"ocean\"").blend(0.7, 0.3)')
    schedule = [{"from": 10, "to": 0.75, "prompt": "b"}, {"from": 15, "to": None, "prompt": "c", "ramp": True}]
    told = word(prompt="a", negative_prompt="d", schedule=schedule)
    assert parse(told.prompt) == parse('("a", "b", "c").schedule(10-0.75, 15~1.0)')
    assert told.negative_prompt == "d"


def test_beside_pieces_all_is_put_into_one_syntax() -> None:
    told = word(
        prompt=[{"text": "red++", "weight": 1.0}, {"text": "b"}], negative_prompt="(x)--", prompt_syntax=Syntax.COMPEL
    )
    assert told.syntax is Syntax.A1111
    assert parse(told.negative_prompt or "") == parse("(x)--", syntax=Syntax.COMPEL)
    told = word(prompt=[{"text": "a (b:2)"}, {"text": "c"}], prompt_syntax=Syntax.PLAIN)
    assert parse(told.prompt) == parse(r'("a \(b:2\)", "c").blend(1, 1)')


def test_pieces_are_filled_in_too() -> None:
    told = word(prompt=[{"text": "a {thing}"}, {"text": "b"}], variables={"thing": "cat", "other": "dog"},
                schedule=[{"from": 5, "prompt": "a {other}"}])  # fmt: skip
    assert "a cat" in told.prompt
    assert "a dog" in told.prompt


def test_a_wrong_piece_is_named_by_its_place() -> None:
    assert refused("schedule.1.to", prompt="a", schedule=[{"from": 1, "to": 2, "prompt": "b"},
                                                          {"from": 5, "to": 40, "prompt": "c"}])  # fmt: skip
    assert refused("prompt.1.text", prompt=[{"text": "a"}, {"text": "a {b}"}])
    assert refused("schedule.0.prompt", prompt="a", schedule=[{"from": 1, "to": 2, "prompt": "{b}"}])
    assert refused("prompt", prompt=[{"text": "a", "weight": 1}, {"text": "b", "weight": -1}])
    assert refused("prompt", prompt=[])


def test_what_is_too_long_is_not_read() -> None:
    most = LIMITS.max_prompt_bytes
    refused("prompt", prompt="," * (most + 1))
    refused("prompt", prompt="é" * (most // 2 + 1))
    refused("negative_prompt", prompt="a", negative_prompt="," * (most + 1))
    refused("prompt.1.text", prompt=[{"text": "a"}, {"text": "," * (most + 1)}])
    refused("variables.a", prompt="{a}", variables={"a": "," * (most + 1)})
    refused("prompt", prompt="{a}{a}", variables={"a": "," * most})
    refused("prompt", prompt=" \n ")
    refused("prompt", template="style", prompt="x" * most)


PIECES = [*"ab{}|\\()[]:,", "{x}", "{a|b}", " AND ", " BREAK ", '"', "<c>", "0.5"]
SOUP = st.lists(st.sampled_from(PIECES), max_size=24).map("".join)
SYNTAXES = st.sampled_from([Syntax.A1111, Syntax.COMPEL, Syntax.PLAIN])


@given(SOUP, SOUP, st.integers(0, 2**32 - 1), SYNTAXES)
def test_what_was_worded_once_is_worded_so_again(text: str, value: str, seed: int, syntax: Syntax) -> None:
    """A job's `request` is an order that repeats its pictures: nothing in it is chosen or filled in again."""
    variables = {"x": value} if "{x}" in text and syntax is not Syntax.PLAIN else None
    try:
        first = word(seed, prompt=text, prompt_syntax=syntax, variables=variables)
    except InvalidRequest:
        return
    again = word(seed + 1, prompt=first.prompt, prompt_syntax=first.syntax)
    assert again == first


@given(SOUP, SOUP, st.integers(0, 99))
def test_pieces_that_were_worded_once_are_worded_so_again(left: str, right: str, seed: int) -> None:
    try:
        first = word(seed, prompt=[{"text": left, "weight": 0.3}, {"text": right, "weight": 0.9}])
    except InvalidRequest:
        return
    again = word(seed + 1, prompt=first.prompt, prompt_syntax=first.syntax)
    assert again == first
