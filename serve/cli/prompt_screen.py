"""What `tandem prompt` prints: tokens by encoder with their weights, rows, what is cut, the text of every step, where
the units are kept, advice; or a matrix of similarities.

Whatever a colour says stands there in characters too: a weight behind its words, `cut:` before what is cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from serve.telemetry.logs import escape

_FIELDS = {"prompt": "prompt", "negative_prompt": "negative"}
_FACT = 10
_SHOWN_PHASES, _SHOWN_STEPS, _SHOWN_UNITS = 12, 6, 12
_SHORT, _LONGEST = 40, 60
"""Characters of a text that a schedule shows whole, and of what it shows at most."""
_TIERS = {"memory": ("in memory", "green"), "redis": ("in Redis", "cyan"), "encoded": ("to encode", "yellow")}
_HEAVY, _LIGHT, _NEGATIVE = "bold red", "blue", "magenta"
_BARE = "yellow"
"""Of a weight a little above 1."""
_MUCH = 1.4


def shown_analysis(found: Mapping[str, Any], console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    for name, fact in _facts(found):
        line = Table.grid(padding=(0, 1))
        line.add_column(width=_FACT, style="dim")
        line.add_column()
        line.add_row(name, fact)
        console.print(line)
    for text in range(len(found["texts"])):
        _print_text(console, found, text)
    for cut in found["truncated"]:
        console.print()
        gone = f"{cut['tokens'] - cut['limit']} of {cut['tokens']} tokens of the {_field(cut['field'])}"
        console.print(Text(f"{gone} don't fit into {escape(cut['encoder'])}", style="red"))
        console.print(Padding(Text.assemble(("cut: ", "red"), (escape(cut["text"]), "red strike")), (0, 0, 0, 2)))
    if len(found["schedule"]) > 1 or found["composed"] > 1 or len(found["schedule"][0]["positive"][0]["mix"]) > 1:
        console.print(_schedule(found))
    console.print(_units(found))
    told = [("note", "cyan", note) for note in found["notes"]]
    # What is cut stands above, to the letter.
    told += [("advice", "yellow", note) for note in found["advice"] if note["code"] != "cut"]
    if told:
        console.print()
    for kind, style, note in told:
        _print_note(console, kind, style, note)


def shown_similarity(found: Mapping[str, Any], prompts: Sequence[str], console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    for at, prompt in enumerate(prompts):
        console.print(Text.assemble((f"{at + 1:>3}  ", "bold"), escape(prompt)))
    for each in found["compared"]:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, title_justify="left", title_style="bold")
        table.title = f"{escape(each['encoder'])} ({_compared_by(each['by'])})"
        table.add_column("", justify="right", no_wrap=True)
        for at in range(len(prompts)):
            table.add_column(str(at + 1), justify="right", no_wrap=True)
        for at, row in enumerate(each["matrix"]):
            table.add_row(str(at + 1), *(_cosine(cosine, same=at == n) for n, cosine in enumerate(row)))
        console.print(Padding(table, (1, 0, 0, 0)))


def _facts(found: Mapping[str, Any]) -> Iterator[tuple[str, Text]]:
    steps = f"{found['num_inference_steps']} steps"
    how = f"{found['prompt_syntax']} syntax, {found['prompt_weighting']} weights, long texts: {found['long_prompt']}"
    yield "model", Text.assemble((escape(found["model"]), "bold"), f" ({found['family']}), {steps}, {how}")
    if found["template"] is not None:
        arm = f", arm {escape(found['arm'])}" if found["arm"] else ""
        yield "template", Text(f"{escape(found['template'])}{arm}")
    yield "prompt", Text(escape(found["prompt"]))
    if found["negative_prompt"]:
        yield "negative", Text(escape(found["negative_prompt"]))


def _print_text(console: Console, found: Mapping[str, Any], at: int) -> None:
    """A text as each encoder reads it."""
    readings = [reading for reading in found["readings"] if reading["text"] == at]
    if not readings:
        return
    same = [n for n, text in enumerate(found["texts"]) if text["field"] == found["texts"][at]["field"]]
    number = f" {same.index(at) + 1} of {len(same)}" if len(same) > 1 else ""
    console.print()
    console.print(Text(f"{_field(found['texts'][at]['field'])}{number}", style="bold"))
    for reading in readings:
        tokens = sum(len(row["tokens"]) for row in reading["rows"])
        rows = len(reading["rows"])
        size = f"{tokens} token{'s' * (tokens != 1)}" + (f" in {rows} rows" if rows > 1 else "")
        console.print(Text.assemble("  ", (escape(reading["encoder"]), "cyan"), (f"  {size}", "dim")))
        lines = Table.grid(padding=(0, 2))
        for place, row in enumerate(reading["rows"], 1):
            lines.add_row(*([Text(str(place), style="dim")] if rows > 1 else []), _tokens(row["tokens"]))
        console.print(Padding(lines, (0, 0, 0, 4)))


def _tokens(tokens: Sequence[Mapping[str, Any]]) -> Text:
    """Each token apart: a dot between those of one word. Behind words of one weight, that weight."""
    line = Text()
    for at, token in enumerate(tokens):
        text = escape(token["text"])
        if at:
            last = tokens[at - 1]
            line.append_text(_weight(last, token["weight"]))
            parted = text.startswith(" ") or last["text"].endswith(" ")
            line.append(" " if parted else "·", style="dim")
        line.append(text.strip(), style=f"{_style(token['weight'])} {_kind(token)}".strip())
    return line.append_text(_weight(tokens[-1], 1.0)) if tokens else Text("(nothing)", style="dim")


def _weight(token: Mapping[str, Any], following: float) -> Text:
    """Behind the last of the words that have it; nothing where it is 1."""
    weight = token["weight"]
    if weight in (1.0, following):
        return Text()
    return Text(f":{weight:.3g}", style=f"{_style(weight)} dim")


def _kind(token: Mapping[str, Any]) -> str:
    return "underline red" if token["unknown"] else "underline green" if token["concept"] else ""


def _style(weight: float) -> str:
    if weight == 1.0:
        return ""
    if weight < 0:
        return _NEGATIVE
    return _LIGHT if weight < 1 else _BARE if weight < _MUCH else _HEAVY


def _schedule(found: Mapping[str, Any]) -> Padding:
    """A row for each reading, with all the steps that have it: alternations come back to the same."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("steps", justify="right")
    table.add_column("read")
    rows: dict[str, tuple[list[str], Mapping[str, Any]]] = {}
    for phase in found["schedule"]:
        first, last = phase["first"], phase["last"]
        steps, _ = rows.setdefault(json.dumps([phase["positive"], phase["negative"]]), ([], phase))
        steps.append(f"{first}-{last}" if last > first else str(first))
    names = _names(found)
    shown = list(rows.values())
    for steps, phase in shown if len(shown) <= _SHOWN_PHASES else shown[: _SHOWN_PHASES - 2]:
        table.add_row(_steps(steps), _read(phase, names, found))
    if len(shown) > _SHOWN_PHASES:
        table.add_row("…", Text(f"{len(shown) - _SHOWN_PHASES + 1} more", style="dim"))
        steps, phase = shown[-1]
        table.add_row(_steps(steps), _read(phase, names, found))
    return Padding(table, (1, 0, 0, 0))


def _steps(steps: Sequence[str]) -> str:
    return ", ".join(steps) if len(steps) <= _SHOWN_STEPS else f"{', '.join(steps[: _SHOWN_STEPS - 1])}, … {steps[-1]}"


def _names(found: Mapping[str, Any]) -> list[str]:
    """What each text is called in the schedule: a long one by the words in which it differs from the others of its
    field."""
    names = []
    for text in found["texts"]:
        words = text["text"].split()
        others = [each["text"].split() for each in found["texts"] if each["field"] == text["field"] and each != text]
        if len(text["text"]) > _SHORT and others:
            before = min(_common(words, other) for other in others)
            after = min(_common(words[before:][::-1], other[before:][::-1]) for other in others)
            first, last = max(0, before - 1), min(len(words), len(words) - after + 1)
            words = [*["…"] * (first > 0), *words[first:last], *["…"] * (last < len(words))]
        name = escape(" ".join(words)) or "(nothing)"
        names.append(name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…")
    return names


def _common(words: Sequence[str], other: Sequence[str]) -> int:
    """How many of the first words are the same."""
    same = (mine == its for mine, its in zip(words, other, strict=False))
    return sum(1 for _ in takewhile(bool, same))


def _read(phase: Mapping[str, Any], names: Sequence[str], found: Mapping[str, Any]) -> Text:
    """The mixes of a step; those of a composition on lines of their own, with their weights."""
    line = Text()
    lanes = phase["positive"]
    for number, lane in enumerate(lanes):
        line.append("\n" if number else "")
        if len(lanes) > 1:
            line.append(f"AND {lane['weight']:g}  ", style="dim")
        line.append_text(_mix(lane["mix"], names))
    negative = phase["negative"]
    if negative is not None and (len(negative) > 1 or _changes(found)):
        line.append("\nnot  ", style="dim").append_text(_mix(negative, names))
    return line


def _changes(found: Mapping[str, Any]) -> bool:
    """Whether the negative text is another in some step."""
    return len({str(phase["negative"]) for phase in found["schedule"]}) > 1


def _mix(mix: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Text:
    line = Text()
    shares = [share for share in mix if share["share"]]
    for number, share in enumerate(shares):
        line.append(" + " if number else "", style="dim")
        if len(shares) > 1 or share["share"] != 1.0:
            line.append(f"{share['share']:.3g} × ", style="yellow")
        line.append(names[share["text"]])
    return line


def _units(found: Mapping[str, Any]) -> Padding:
    units = found["units"]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, caption_justify="left")
    for column in ("unit", "encoder", "output", "side", "where"):
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    for unit in units[:_SHOWN_UNITS]:
        where, style = _TIERS[unit["tier"]]
        output = unit["output"].partition(":")[0] if unit["output"].startswith("projected") else unit["output"]
        cells = (unit["key"][:8], escape(unit["encoder"]), output, unit["sign"])
        table.add_row(*map(Text, cells), Text(where, style=style))
    left = f", {len(units) - _SHOWN_UNITS} of them not shown" if len(units) > _SHOWN_UNITS else ""
    table.caption = f"{_counted(units)}{left}"
    return Padding(table, (1, 0, 0, 0))


def _counted(units: Sequence[Mapping[str, Any]]) -> str:
    counts = {tier: sum(unit["tier"] == tier for unit in units) for tier in _TIERS}
    told = ", ".join(f"{count} {_TIERS[tier][0]}" for tier, count in counts.items() if count)
    return f"{len(units)} unit{'s' * (len(units) != 1)} of text: {told}"


def _print_note(console: Console, kind: str, style: str, note: Mapping[str, Any]) -> None:
    line = Table.grid(padding=(0, 1))
    line.add_column(width=_FACT, style=style)
    line.add_column()
    line.add_row(kind, Text(f"{_field(note['field'])}: {escape(note['message'])}"))
    console.print(line)


def _compared_by(by: str) -> str:
    return {"projected": "as held against images", "pooled": "end of the text", "mean": "mean of the tokens"}[by]


def _cosine(cosine: float, *, same: bool) -> Text:
    style = "dim" if same else "green" if cosine >= 0.9 else "yellow" if cosine >= 0.7 else ""
    return Text(f"{cosine:.3f}", style=style)


def _field(name: str) -> str:
    return _FIELDS.get(name, name)
