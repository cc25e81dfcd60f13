"""The concepts that a text names: `<name>`, and a bare word that is one's name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches

from serve.errors import InvalidRequest
from serve.prompts.ast import Break
from serve.prompts.concepts import ConceptFault, ConceptRef, Concepts
from serve.prompts.flats import Flat, Span

_WORD = re.compile(r"[A-Za-z0-9_-]+")


class Names:
    """The concepts of one request, looked up once each. `refs` has those that were named so far, by role."""

    def __init__(self, concepts: Concepts) -> None:
        self._concepts = concepts
        self._bare = concepts.names()
        self.refs: dict[str, Mapping[str, ConceptRef]] = {}

    def resolve(self, flat: Flat, field: str, written: str, *, bare: bool) -> Flat:
        """The text with a span for each concept. With `bare`, a word that is a concept's name stands for it.

        `written` is the request's text, to say where something stands. Raises InvalidRequest for a concept that nobody
        defines, and for one that the model can't use.
        """
        if bare and self._bare:
            flat = tuple(part for each in flat for part in _parted(each, self._bare))
        for each in flat:
            if isinstance(each, Span) and each.concept is not None and each.concept not in self.refs:
                self.refs[each.concept] = self._found(each.concept, field, written)
        return flat

    def _found(self, name: str, field: str, written: str) -> Mapping[str, ConceptRef]:
        try:
            refs = self._concepts.find(name)
        except ConceptFault as fault:
            raise InvalidRequest(f"{field}: {_place(name, written)}{fault}", field) from None
        if refs is None:
            near = get_close_matches(name, self._bare, 3)
            meant = f"; there is {', '.join(f'<{each}>' for each in near)}" if near else ""
            raise InvalidRequest(f"{field}: {_place(name, written)}no concept is named <{name[:64]}>{meant}", field)
        return refs


def _parted(each: Span | Break, names: Collection[str]) -> Iterator[Span | Break]:
    if isinstance(each, Break) or each.concept is not None:
        yield each
        return
    end = 0
    for word in _WORD.finditer(each.text):
        if word[0] in names:
            if word.start() > end:
                yield Span(each.text[end : word.start()], each.weight)
            yield Span(word[0], each.weight, word[0])
            end = word.end()
    if end < len(each.text):
        yield Span(each.text[end:], each.weight)


def _place(name: str, written: str) -> str:
    """Where the name stands first, counted from 1. A text that has it by way of escapes has it nowhere as it is."""
    at = written.find(f"<{name}>")
    if at < 0:
        at = written.find(name)
    return f"character {at + 1}: " if at >= 0 else ""
