r"""Compel's prompt syntax -> the same tree as A1111's.

    word++  (some words)++  "some words"++        1.1 times for each +, 0.9 times for each -
    (some words)1.5  word.attend(1.5)             1.5 times
    ("a", "b").blend(0.7, 0.3)                    the weighted sum; `no_normalize` as the last argument
    ("a", "b").and(1, 0.5)                        one below the other
    \( \) \"                                      the character; ours: \{ \} too
    <name>                                        ours: a learned concept

The behaviour is that of Compel's own parser (https://github.com/damian0815/compel), which reads word by word, drops the
blanks and keeps other backslashes; what it can't read as syntax is text up to the next blank. Where it would go on
silently with a part of what was written, or fail, this refuses: text behind a call, weights that don't fit its prompts.
`.swap()` and `.withLora()` are refused by name.
"""

from __future__ import annotations

import re

from serve.prompts.ast import Blend, Concept, Conjunction, Prompt, Words
from serve.prompts.building import WordsBuilder, power
from serve.prompts.calls import Call, arguments, made
from serve.prompts.compel_words import CompelReader, Group, Leaf, leaves
from serve.prompts.places import CONCEPT, MAX_PARTS, Source, in_range

_COMMA = re.compile(r",\S")
_REFUSED = re.compile(r"\.(?P<swap>swap)\s*\(|\b(?P<lora>withLora|useLora)\s*\(|<(?P<network>\w+):[^>]")
_UNQUOTED = re.compile(r'\\([()"{}])')
_CONCEPT = re.compile(rf"<(?P<name>{CONCEPT})>")
_CALL = re.compile(r"\s*\)\s*(?P<dot>\.)(?P<name>blend|and|add)\s*\((?P<arguments>[^()]*)(?P<end>\))?\s*")


def read_compel(source: Source) -> Prompt:
    """The prompt in normal form. Time grows linearly with the text. Raises InvalidRequest."""
    _refuse_unsupported(source)
    spaced = _with_blanks(source)
    return _call(spaced) or _words(spaced, CompelReader(spaced).prompt())


def _with_blanks(source: Source) -> Source:
    """A blank behind every comma, as Compel has it: of several commas in a row, behind each second one."""
    text: list[str] = []
    added: list[int] = []
    last = 0
    for match in _COMMA.finditer(source.text):
        at = match.start() + 1
        added.append(at + len(added))
        text.append(source.text[last:at])
        last = at
    return Source(" ".join((*text, source.text[last:])), source.field, added=tuple(added), inside=source)


def _call(source: Source) -> Blend | Conjunction | None:
    """The call that the text is, or None. Its prompts are read like brackets, and where they can't be, like prompts."""
    reader = CompelReader(source)
    begin = reader.blanks(0)
    if not source.text.startswith("(", begin):
        return None
    found: list[list[Leaf | Group]] = []
    at = begin
    while at == begin or source.text.startswith(",", at):
        target = reader.target(reader.blanks(at + 1))
        if target is None:
            return None
        found.append(target[0])
        at = reader.blanks(target[1])
    match = _CALL.match(source.text, at)
    if match is None:
        return None
    if match["end"] is None:
        raise source.refuse(match.start("name"), f".{match['name']}() is never closed")
    if match.end() < len(source.text):
        raise source.refuse(match.end(), f"a .{match['name']}() is a whole prompt; nothing may follow")
    if len(found) > MAX_PARTS:
        raise source.refuse(begin, f"more than {MAX_PARTS} prompts in one call")
    name = "and" if match["name"] == "add" else match["name"]
    given = arguments(match["arguments"], match.start("arguments"))
    call = Call(name, match.start("name"), match.end(), (), given)
    prompt = made(call, source, tuple(_words(source, nodes) for nodes in found))
    assert isinstance(prompt, Blend | Conjunction)
    return prompt


def _words(source: Source, nodes: list[Leaf | Group]) -> Words:
    """Fragments with the blank between them that Compel joins them with, outside of the weights where these differ."""
    builder = WordsBuilder()
    before: tuple[float, int] | None = None
    for text, factor, steps, at in leaves(nodes):
        in_range(source, at, power(factor, steps))
        weight = (factor, steps)
        if before is not None:
            builder.text(" ", *(weight if weight == before else ()))
        before = weight
        last = 0
        text = _UNQUOTED.sub(r"\1", text)
        for match in _CONCEPT.finditer(text):
            builder.text(text[last : match.start()], *weight)
            builder.word(Concept(match["name"]), *weight)
            last = match.end()
        builder.text(text[last:], *weight)
    return builder.finish()


def _refuse_unsupported(source: Source) -> None:
    last = source.text.rfind(">")
    for match in _REFUSED.finditer(source.text):
        if match["network"] is None:
            name = match["swap"] or match["lora"]
            raise source.refuse(match.start(match.lastgroup or 0), f".{name}() is not supported yet")
        if match.end() <= last:
            name = match["network"][:20]
            raise source.refuse(match.start(), f"<{name}:...>: extra networks are not supported yet")
