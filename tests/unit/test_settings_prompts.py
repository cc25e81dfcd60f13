"""Templates and their arms, from every origin."""

import json
from pathlib import Path
from typing import Any

import pytest

from serve.errors import OperatorError
from serve.origins import load
from serve.prompts.places import MAX_CHARACTERS
from serve.settings.orders import ArmSettings, TemplateSettings

PORTRAIT = {"text": "a portrait of {subject}"}
TEST = {"arms": {"plain": {"text": "{prompt}"}, "rich": {"text": "{prompt}, oil", "share": 3}}}


def yaml(folder: Path, text: str) -> Path:
    file = folder / "settings.yaml"
    file.write_text(text)
    return file


def refused(tmp_path: Path, templates: Any) -> str:
    with pytest.raises(OperatorError) as error:
        load(yaml(tmp_path, json.dumps({"prompts": {"templates": templates}})), {})
    return error.value.message


def test_templates_come_from_a_file_the_environment_and_the_command_line(tmp_path: Path) -> None:
    file = yaml(tmp_path, json.dumps({"prompts": {"templates": {"portrait": PORTRAIT, "test": TEST}}}))
    expected = {"portrait": TemplateSettings(**PORTRAIT), "test": TemplateSettings(**TEST)}
    assert load(file, {}).settings.prompts.templates == expected
    environ = {"TANDEM_PROMPTS__TEMPLATES": json.dumps({"portrait": PORTRAIT, "test": TEST})}
    assert load(None, environ).settings.prompts.templates == expected
    whole = {"prompts.templates": json.dumps({"portrait": PORTRAIT, "test": TEST})}
    assert load(None, {}, whole).settings.prompts.templates == expected
    loaded = load(file, {}, {"prompts.templates.portrait.text": "a {subject}"})
    assert loaded.settings.prompts.templates["portrait"].text == "a {subject}"
    assert loaded.settings.prompts.templates["test"].arms["rich"] == ArmSettings(text="{prompt}, oil", share=3)
    assert set(loaded.origins["prompts.templates"].split(", ")) == {f"file {file}", "command line"}


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path, {"a": {}}).startswith("prompts.templates.a: a template has either a text or arms")
    assert refused(tmp_path, {"a": PORTRAIT | TEST}).startswith("prompts.templates.a: ")
    assert refused(tmp_path, {"a": {"txt": "b"}}).startswith("prompts.templates.a.")
    assert refused(tmp_path, {"a/b": PORTRAIT}).startswith("prompts.templates.a/b: the name")
    assert refused(tmp_path, {"a" * 65: PORTRAIT}).startswith("prompts.templates.a")
    assert refused(tmp_path, {"a": {"arms": {"b c": {"text": "d"}}}}).startswith(
        "prompts.templates.a.arms.b c: the name"
    )
    for share in (0, -1, float("inf")):
        told = refused(tmp_path, {"a": {"arms": {"b": {"text": "c", "share": share}}}})
        assert told.startswith("prompts.templates.a.arms.b.share: ")
    assert refused(tmp_path, {"a": PORTRAIT | {"syntax": "plain"}}).startswith("prompts.templates.a.syntax: ")


def test_the_environment_s_table_must_be_json() -> None:
    with pytest.raises(OperatorError, match="TANDEM_PROMPTS__TEMPLATES: its value is not JSON"):
        load(None, {"TANDEM_PROMPTS__TEMPLATES": "{portrait"})
    with pytest.raises(OperatorError, match="TANDEM_PROMPTS__TEMPLATES__A__TEXT: no such setting"):
        load(None, {"TANDEM_PROMPTS__TEMPLATES__A__TEXT": "b"})


def test_no_prompt_may_be_longer_than_what_is_read() -> None:
    assert load(None, {}, overrides={"limits.max_prompt_bytes": MAX_CHARACTERS}).settings.limits.max_prompt_bytes
    with pytest.raises(OperatorError, match="max_prompt_bytes"):
        load(None, {}, overrides={"limits.max_prompt_bytes": MAX_CHARACTERS + 1})
