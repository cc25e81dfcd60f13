"""Options that several commands share, and the settings that they name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from serve.cli.client import KEY_VARIABLE, Client, local_url
from serve.cli.running import run
from serve.domain.text import LongPrompt, Syntax, Weighting
from serve.errors import OperatorError
from serve.origins import Loaded, load

if TYPE_CHECKING:
    from serve.cli.backstage import Backstage

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with settings (docs/settings.md).")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="ROOM.FIELD=VALUE", help="Any setting; may be repeated.")
]
Port = Annotated[int | None, typer.Option(help="Port to listen on.")]
Url = Annotated[
    str | None, typer.Option(help="The server's address.", show_default="http.host and http.port of the settings")
]
Key = Annotated[
    str | None, typer.Option(envvar=KEY_VARIABLE, help="An API key, for a server that wants one.", show_default=False)
]
DataDir = Annotated[Path | None, typer.Option(help="Folder for images, Redis files and logs.")]
Syntaxes = Annotated[
    Syntax | None,
    typer.Option("--syntax", help="What the prompts are written in; by default a1111.", show_default=False),
]
Weightings = Annotated[
    Weighting | None, typer.Option("--weighting", help="What a weight does; by default a1111.", show_default=False)
]
LongPrompts = Annotated[
    LongPrompt | None,
    typer.Option("--long", help="What becomes of a text that is too long; by default chunk.", show_default=False),
]
Template = Annotated[str | None, typer.Option(help="A prompt of the server's; PROMPT is its {prompt}.")]
Arm = Annotated[str | None, typer.Option(help="Which of the template's texts; by default the seed says.")]
Variables = Annotated[
    list[str] | None, typer.Option("--var", metavar="NAME=TEXT", help="What stands for {NAME}; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load_settings(file: Path | None, assignments: Sequence[str] | None, named: dict[str, Any]) -> Loaded:
    """The settings; an option of its own, in `named` by the setting's name, wins over the same setting in --set."""
    overrides: dict[str, Any] = {}
    for assignment in assignments or ():
        name, equals, value = assignment.partition("=")
        if not equals:
            raise OperatorError(f"--set {assignment}: write ROOM.FIELD=VALUE", "set")
        overrides[name.strip()] = value
    return load(file, overrides=overrides | {name: value for name, value in named.items() if value is not None})


def settings_tree(assignments: Sequence[str]) -> dict[str, Any]:
    """ROOM.FIELD=VALUE as groups; a value is YAML. Whether there is such a setting is checked when they are opened.
    Raises OperatorError naming the option."""
    tree: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        *rooms, leaf = name.strip().split(".")
        if not equals or not leaf:
            raise OperatorError(f"--set {assignment}: write ROOM.FIELD=VALUE", "set")
        node = tree
        for room in rooms:
            node = node.setdefault(room, {})
            if not isinstance(node, dict):
                raise OperatorError(f"--set {assignment}: {room} has a value already", "set")
        try:
            node[leaf] = yaml.safe_load(value)
        except yaml.YAMLError:
            node[leaf] = value
    return tree


def variables(assignments: Sequence[str] | None) -> dict[str, str] | None:
    """Those of a prompt; None without any."""
    values: dict[str, str] = {}
    for assignment in assignments or ():
        name, equals, value = assignment.partition("=")
        if not equals:
            raise OperatorError(f"--var {assignment}: write NAME=TEXT", "var")
        values[name.strip()] = value
    return values or None


def wording(
    negative: str | None,
    template: str | None,
    arm: str | None,
    var: Sequence[str] | None,
    syntax: Syntax | None,
    weighting: Weighting | None,
    long_prompt: LongPrompt | None,
) -> dict[str, Any]:
    """The fields of an order that say what its prompt is, beside the prompt."""
    return {
        "negative_prompt": negative,
        "template": template,
        "arm": arm,
        "variables": variables(var),
        "prompt_syntax": syntax,
        "prompt_weighting": weighting,
        "long_prompt": long_prompt,
    }


def client(url: str | None, key: str | None) -> Client:
    """Of the server that the command is about."""
    return Client(url or local_url(load().settings.http), key)


def behind(
    story: Callable[[Backstage], Awaitable[None]],
    data_dir: Path | None,
    config_file: Path | None,
    assignments: Sequence[str] | None,
    *,
    begin: bool = False,
) -> None:
    """Run the story behind the scenes of the server that has these settings, or will have where this may `begin` it."""
    settings = load_settings(config_file, assignments, {"data_dir": data_dir}).settings
    from serve.cli.backstage import backstage  # redis takes a while to import

    async def told() -> None:
        async with backstage(settings, begin=begin) as stage:
            await story(stage)

    run(told())
