"""`tandem prompt`: what it asks for, and what it prints of what a real planner found."""

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from rich.console import Console
from starlette.responses import JSONResponse

from serve.analysis import analysis
from serve.api.analysis_schemas import AnalysisReport
from serve.cli.prompt_screen import shown_analysis, shown_similarity
from serve.domain.text import LongPrompt, TextRequest, Tier
from serve.models import SHIPPED, check_folder
from serve.prompts.plan import Planner, Source

Tandem = Callable[..., int]


@pytest.fixture(scope="module")
def planner() -> Planner:
    model = check_folder(SHIPPED, "shapes", text_only=True)
    (part,) = model.text
    return Planner(model, {part.role: Source(fingerprint="f", name=part.name, part=part)})


def found(planner: Planner, prompt: str, negative: str | None = None, **fields: Any) -> Mapping[str, Any]:
    given: dict[str, Any] = {"model": "shapes", "width": 64, "height": 64, "num_inference_steps": 20} | fields
    request = TextRequest(prompt=prompt, negative_prompt=negative, **given)
    plan = planner.plan(request)
    tiers = dict(zip((unit.key for unit in plan.units), [Tier.MEMORY, Tier.REDIS, *[Tier.ENCODED] * 99], strict=False))
    told = AnalysisReport.of(analysis(request, planner, plan, tiers, guided=True, template="portrait", arm="rich"))
    answer: Mapping[str, Any] = json.loads(told.model_dump_json())
    return answer


def printed(planner: Planner, prompt: str, negative: str | None = None, width: int = 100, **fields: Any) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, record=True)
    shown_analysis(found(planner, prompt, negative, **fields), console)
    return console.export_text()


def test_tokens_weights_and_units_stand_there_without_colours(planner: Planner) -> None:
    text = printed(planner, "a (red:1.5) circle", "a [star]")
    assert "a red:1.5 circle" in text
    assert "star:0.909" in text
    assert "portrait, arm rich" in text
    assert "2 units of text: 1 in memory, 1 in Redis" in text
    assert "steps" not in text.split("\n\n", 1)[1], "one text for all steps needs no table"


def test_rows_and_what_is_cut(planner: Planner) -> None:
    long = ", ".join(["a red circle"] * 30)
    text = printed(planner, long)
    assert " in 2 rows" in text
    assert any(line.strip().startswith("2  ") for line in text.splitlines())
    text = printed(planner, long, long_prompt=LongPrompt.HEAD)
    assert "tokens of the prompt don't fit into" in text
    assert "cut: " in text


def test_every_step_s_text(planner: Planner) -> None:
    text = printed(planner, "a [red:blue:5] circle")
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "0-4 a red circle" in rows
    assert "5-19 a blue circle" in rows
    text = printed(planner, "a [red:blue:2-18] circle")
    assert "0.5 × a red circle + 0.5 × a blue circle" in text
    assert "more" in text, "a long ramp is not told step by step"
    text = printed(planner, "a red circle AND a blue square :0.5", "")
    assert "AND 1  a red circle" in text
    assert "AND 0.5  a blue square" in text


def test_notes_and_advice(planner: Planner) -> None:
    text = printed(planner, '("a (red:2) circle", "b").blend(1, 1)', "red circle")
    assert "note       prompt: the weights 1, 1 of a blend add up to 2" in text
    assert "advice" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_it_fits_whatever_the_width(planner: Planner, width: int) -> None:
    text = printed(planner, "a [red:blue:0.5] " + "long words, " * 60, "star " * 30, width=width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width


def test_no_control_character_of_a_prompt_reaches_the_terminal(planner: Planner) -> None:
    told = dict(found(planner, "a circle"))
    told["prompt"] = told["texts"][0]["text"] = told["readings"][0]["rows"][0]["tokens"][0]["text"] = "\x1b[2J"
    console = Console(file=io.StringIO(), width=80, highlight=False)
    shown_analysis(told, console)
    assert "\x1b[2J" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_what_is_asked_for(script: Any, planner: Planner, tandem: Tandem, capsys: pytest.CaptureFixture[str]) -> None:
    script.found = found(planner, "a circle")
    options = ["--negative", "b", "--steps", "10", "--syntax", "compel", "--weighting", "compel", "--long", "head"]
    options += ["--var", "x=a=b", "--seed", "3", "--template", "t", "--arm", "u", "--model", "m", "--clip-skip", "1"]
    assert tandem("prompt", "a {x}", "--url", script.url, *options) == 0
    assert script.analyses == [
        {
            "prompt": "a {x}", "negative_prompt": "b", "num_inference_steps": 10, "prompt_syntax": "compel",
            "prompt_weighting": "compel", "long_prompt": "head", "variables": {"x": "a=b"}, "seed": 3, "template": "t",
            "arm": "u", "model": "m", "clip_skip": 1,
        }
    ]  # fmt: skip
    assert "a circle" in capsys.readouterr().out
    assert tandem("prompt", "a circle", "--json", "--url", script.url) == 0
    assert json.loads(capsys.readouterr().out) == script.found
    assert script.analyses[-1] == {"prompt": "a circle"}


def test_several_prompts_are_compared(script: Any, tandem: Tandem, capsys: pytest.CaptureFixture[str]) -> None:
    matrix = [[1.0, 0.91, 0.2], [0.91, 1.0, 0.3], [0.2, 0.3, 1.0]]
    compared = {"role": "text_encoder", "encoder": "clip-l", "by": "pooled", "matrix": matrix}
    script.found = {"model": "m", "family": "sd", "compared": [compared]}
    assert tandem("prompt", "a", "b", "c", "--model", "m", "--url", script.url) == 0
    assert script.comparisons == [{"prompts": ["a", "b", "c"], "model": "m"}]
    out = capsys.readouterr().out
    assert "clip-l (end of the text)" in out
    assert "0.910" in out
    assert tandem("prompt", "a", "b", "--negative", "c", "--url", script.url) == 2
    assert "negative_prompt" in capsys.readouterr().err
    assert tandem("prompt", *map(str, range(17)), "--url", script.url) == 2
    console = Console(file=io.StringIO(), width=60, record=True)
    shown_similarity(script.found, ["a", "b", "c"], console)
    assert max(len(line.rstrip()) for line in console.export_text().splitlines()) <= 60


def test_nothing_to_look_at_and_a_refusal_are_one_line(
    script: Any, tandem: Tandem, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tandem("prompt", "--url", script.url) == 2
    assert "name a prompt" in capsys.readouterr().err
    assert tandem("prompt", "a", "--var", "x", "--url", script.url) == 2
    assert "--var x" in capsys.readouterr().err
    script.refusal = JSONResponse(
        {"error": {"message": "prompt: no concept is named <x>", "type": "x", "param": "prompt", "code": "x"}}, 422
    )
    assert tandem("prompt", "a <x>", "--url", script.url) == 2
    assert capsys.readouterr().err == "tandem: prompt: no concept is named <x>\n"


def test_an_order_by_template(script: Any, tandem: Tandem, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--template", "portrait", "--arm", "rich", "--var", "subject=a cat", "--syntax", "a1111"]
    assert tandem("generate", "--url", script.url, "--out", tmp_path, *options) == 0
    assert script.orders[-1] == {
        "template": "portrait", "arm": "rich", "variables": {"subject": "a cat"}, "prompt_syntax": "a1111",
        "num_images": 1,
    }  # fmt: skip
    assert tandem("generate", "--url", script.url) == 2
    assert "name a prompt" in capsys.readouterr().err
