"""Writes docs/settings.md from serve/settings; with --check it only says whether the file is in step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from serve.settings.tree import ENV_DELIMITER, ENV_PREFIX, Settings

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = """# Settings

Generated from `serve/settings` by `make fix`. A setting comes from, later ones winning: its default; a YAML file
(`--config FILE` or `TANDEM_CONFIG`); the environment; the command line (`--set room.field=value`). On a cluster: its
default; the environment; the `args` of the [Serve configuration](operations.md#on-a-ray-cluster). An unknown name is
refused. `tandem config show` prints the value of each and where it came from, secrets hidden.

```yaml
http:
  port: 9000
model:
  source: /models/my-checkpoint.safetensors
```
"""
COLUMNS = "| setting | environment | default | what it does |\n|---|---|---|---|\n"


def rooms(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, list[tuple[str, FieldInfo]]]]:
    """(room's dotted name, its own fields), depth first in the order of the source; the root's name is empty.

    What a table has groups of is a room too, called `table.NAME`.
    """
    inner: list[tuple[str, type[BaseModel]]] = []
    fields: list[tuple[str, FieldInfo]] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inner.append((f"{prefix}{name}", kind))
        else:
            fields.append((f"{prefix}{name}", field))
            if get_origin(kind) is dict and issubclass(group := get_args(kind)[1], BaseModel):
                inner.append((f"{prefix}{name}.NAME", group))
    yield prefix.rstrip("."), fields
    for name, kind in inner:
        yield from rooms(kind, f"{name}.")


def page() -> str:
    parts = [HEAD]
    for room, fields in rooms(Settings):
        if not fields:
            continue
        parts.append(
            f"\n## {room or 'General'}\n\n| setting | environment | default | what it does |\n|---|---|---|---|\n"
        )
        for name, field in fields:
            if not field.description:
                raise SystemExit(f"serve/settings: {name} has no description")
            parts.append(f"| `{name}` | {variable(name)} | {default(field)} | {described(field.description)} |\n")
    return "".join(parts)


def described(description: str) -> str:
    """On one line, in one cell: a bar would begin the next one, in code too."""
    return " ".join(description.split()).replace("|", r"\|")


def variable(name: str) -> str:
    """A table has one variable for everything in it."""
    table, inside, _ = name.partition(".NAME")
    spelled = f"`{ENV_PREFIX}{table.replace('.', ENV_DELIMITER).upper()}`"
    return f"in {spelled}" if inside else spelled


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value: Any = field.get_default(call_default_factory=True)
    return "" if value is None or isinstance(value, SecretStr) else f"`{value}`"


def main() -> None:
    text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/settings.md is not in step with serve/settings: run `make fix`")


if __name__ == "__main__":
    main()
