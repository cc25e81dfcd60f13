r"""A prompt as a client writes it -> what it says: the one door to the three syntaxes.

A whole prompt is words, a call over whole prompts, or several of these with `AND` between them. As in A1111, `AND` is
looked for first, wherever it stands; `A\ND` is the word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from serve.domain.text import Syntax
from serve.prompts.ast import Composition, Part, Prompt, Text, Words
from serve.prompts.building import trimmed
from serve.prompts.calls import MAX_CALLS, Call, find_call, made
from serve.prompts.compel_syntax import read_compel
from serve.prompts.grammar import read_words
from serve.prompts.places import CONCEPT, MAX_PARTS, NUMBER, Source, checked, weight

_AND = re.compile(rf"\\[\\<]|<{CONCEPT}>|(?P<and>\bAND\b)")
"""A concept may be called so."""
_AFTER_CALL = re.compile(rf"\s*(?::\s*(?P<weight>{NUMBER})\s*)?(?:(?P<more>\bAND\b)|\Z)")
_NUMBER = re.compile(NUMBER)


def parse(text: str, field: str = "prompt", syntax: Syntax = Syntax.A1111) -> Prompt:
    """The prompt in normal form (`serve.prompts.normal`). Time grows linearly with the text.

    Raises InvalidRequest that names `field` and the character at fault, counted from 1.
    """
    source = checked(text, field)
    if syntax is Syntax.PLAIN:
        return (Text(text),) if text else ()
    if syntax is Syntax.COMPEL:
        return read_compel(source)
    return _whole(source, 0)


def words(text: str, field: str = "prompt") -> Words:
    """Words alone, in A1111's syntax: calls and `AND` are text."""
    return read_words(checked(text, field))


def _whole(source: Source, calls: int) -> Prompt:
    """`calls`: how many this is an argument of, one inside the other."""
    parts = tuple(_parts(source, calls))
    return parts[0].prompt if len(parts) == 1 else Composition(parts)


def _parts(source: Source, calls: int) -> Iterator[Part]:
    """Where there are several, words lose the blanks at their ends, and a number behind a colon is a weight."""
    begin, count = 0, 0
    more = True
    while more:
        count += 1
        if count > MAX_PARTS:
            raise source.refuse(begin, f"more than {MAX_PARTS} prompts in one composition")
        call = find_call(source, begin)
        if call is not None:
            after = _AFTER_CALL.match(source.text, call.end)
            if after is None:
                raise source.refuse(call.end, f"a .{call.name[:20]}() is a whole prompt; nothing but AND may follow")
            more = after["more"] is not None
            share = 1.0
            if after["weight"] is not None:
                share = weight(source, after.start("weight"), after["weight"])
                if not more and count == 1:
                    raise source.refuse(after.start("weight"), "a weight of the only prompt")
            if more:
                _check_outermost(source, after.start("more"), calls)
            yield Part(_called(call, source, calls), share)
            begin = after.end()
            continue
        found = next((match for match in _AND.finditer(source.text, begin) if match["and"]), None)
        more = found is not None
        if found is not None:
            _check_outermost(source, found.start(), calls)
        elif count == 1:
            yield Part(read_words(source))
            return
        end, share = _weighed(source, begin, found.start() if found is not None else len(source.text))
        yield Part(trimmed(read_words(source.part(begin, end))), share)
        begin = found.end() if found is not None else end


def _called(call: Call, source: Source, calls: int) -> Prompt:
    if calls == MAX_CALLS:
        raise source.refuse(call.at, f"more than {MAX_CALLS} calls inside one another")
    return made(call, source, tuple(_whole(prompt, calls + 1) for prompt in call.prompts))


def _check_outermost(source: Source, at: int, calls: int) -> None:
    if calls:
        raise source.refuse(at, r"AND makes a composition, which can't be a part of a call; A\ND is the word")


def _weighed(source: Source, begin: int, end: int) -> tuple[int, float]:
    """Where the words of a part end, and its weight."""
    text = source.text
    colon = text.rfind(":", begin, end)
    if colon < 0:
        return end, 1.0
    written = text[colon + 1 : end]
    escapes = colon - begin - len(text[begin:colon].rstrip("\\"))
    if escapes % 2 or _NUMBER.fullmatch(written.strip()) is None:
        return end, 1.0
    return colon, weight(source, colon + 1 + len(written) - len(written.lstrip()), written.strip())
