r"""Templates: `{subject}` is filled in, of `{a|b|c}` the seed chooses one.

Both may stand inside of choices. `\{` and `\}` are the characters themselves, and stay escaped for the syntax behind;
braces that are neither a name nor a choice are text. What a variable brings is prompt text, but no template: its braces
are escaped.

A text that was expanded is stable: expanding it again changes nothing, so that a record can be posted as it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.prompts.places import MAX_CHARACTERS, Source, checked

MAX_DEPTH = 100
"""Braces that may be open at once."""

_LEX = re.compile(r"(?P<text>(?:[^\\{}|]+|\\.|\\\Z)+)|(?P<sign>[{}|])", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_BRACES = re.compile(r"\\.|(?P<brace>[{}])|(?P<last>\\)\Z", re.DOTALL)


@dataclass(slots=True)
class _Token:
    """A run of text or a sign, at `at`. An opening brace knows its end, and where the bars directly inside stand."""

    text: str
    at: int
    sign: bool
    end: int | None = None
    bars: list[int] = field(default_factory=list)
    name: str | None = None
    """Of an opening brace, the variable's."""


def expand(text: str, variables: Mapping[str, str], seed: int, field: str = "prompt") -> str:
    """The same for the same seed, in every process: choice n takes its option by a hash of `seed` and n.

    Raises InvalidRequest that names the place of a variable without a value, for a value that no prompt may hold, and
    for a text that grows too long.
    """
    if "{" not in text:
        return text
    source = checked(text, field)
    tokens = _tokens(source)
    for token in tokens:
        if token.name is not None and token.name not in variables:
            raise source.refuse(token.at, rf"{{{token.name}}} has no value; \{{ is the character itself")
    for name in dict.fromkeys(token.name for token in tokens if token.name is not None):
        checked(variables[name], f"variables.{name}")
    if not any(token.name is not None or token.bars for token in tokens):
        return text
    return _Expansion(source, tokens, variables, seed).text()


def names(text: str) -> frozenset[str]:
    """The variables that a template has, in options that are not chosen too."""
    if "{" not in text:
        return frozenset()
    return frozenset(token.name for token in _tokens(checked(text, "template")) if token.name is not None)


def _tokens(source: Source) -> list[_Token]:
    """Bars are kept only with the brace that they part, which itself has to be closed."""
    tokens: list[_Token] = []
    opened: list[int] = []
    for match in _LEX.finditer(source.text):
        sign = match["sign"]
        here = len(tokens)
        tokens.append(_Token(match.group(), match.start(), sign is not None))
        if sign == "{":
            if len(opened) >= MAX_DEPTH:
                raise source.refuse(match.start(), f"more than {MAX_DEPTH} braces are open")
            opened.append(here)
        elif sign == "|" and opened:
            tokens[opened[-1]].bars.append(here)
        elif sign == "}" and opened:
            begin = opened.pop()
            brace = tokens[begin]
            brace.end = here
            if here == begin + 2 and not tokens[begin + 1].sign and _NAME.fullmatch(tokens[begin + 1].text):
                brace.name = tokens[begin + 1].text
    for unclosed in opened:
        tokens[unclosed].bars.clear()
    return tokens


class _Expansion:
    """One reading of the tokens. Owns: the text so far."""

    def __init__(self, source: Source, tokens: list[_Token], variables: Mapping[str, str], seed: int) -> None:
        self._source = source
        self._tokens = tokens
        self._variables = variables
        self._seed = seed
        self._text: list[str] = []
        self._length = 0

    def text(self) -> str:
        """Jumps over the options that are not chosen, so it takes no longer than the tokens and the result are."""
        tokens = self._tokens
        choices = {at: n for n, at in enumerate(at for at, token in enumerate(tokens) if token.bars)}
        ends: dict[int, int] = {}
        """Where a chosen option ends (the next bar, or the brace): where its choice ends."""
        at = 0
        while at < len(tokens):
            token = tokens[at]
            if at in ends:
                at = ends[at] + 1
            elif token.bars and token.end is not None:
                borders = [at, *token.bars, token.end]
                chosen = self._chosen(choices[at], len(token.bars) + 1)
                ends[borders[chosen + 1]] = token.end
                at = borders[chosen] + 1
            elif token.name is not None and token.end is not None:
                self._add(_value(self._variables[token.name]), token.at)
                at = token.end + 1
            else:
                self._add(f"\\{token.text}" if token.text in ("{", "}") else token.text, token.at)
                at += 1
        return "".join(self._text)

    def _chosen(self, ordinal: int, options: int) -> int:
        digest = hashlib.blake2b(f"{self._seed}:{ordinal}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) % options

    def _add(self, text: str, at: int) -> None:
        self._length += len(text)
        if self._length > MAX_CHARACTERS:
            raise self._source.refuse(at, f"what is filled in makes the prompt longer than {MAX_CHARACTERS} characters")
        self._text.append(text)


def _value(text: str) -> str:
    """What a variable brings. A backslash at its end escapes nothing, neither in it nor behind it."""
    return _BRACES.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    if match["last"] is not None:
        return ""
    return f"\\{match['brace']}" if match["brace"] is not None else match.group()
