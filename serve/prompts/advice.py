"""What there is to say of a prompt beside what it comes to: notes on what was read otherwise than it was written, and
advice on what is allowed and rarely wanted.

Notes stand in every answer; advice is given where somebody asks (`POST /v1/prompts/analyze`, `tandem prompt`). Neither
changes a picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from serve.domain.text import Note, Syntax, TextRequest
from serve.prompts.ast import (
    Alternate,
    Blend,
    Break,
    Composition,
    Concept,
    Conjunction,
    Prompt,
    Ramp,
    Scheduled,
    Switch,
    Text,
    Weighted,
    When,
    Word,
)
from serve.prompts.parse import parse
from serve.prompts.plan import PromptPlan, TextPlan
from serve.prompts.timeline import Span
from serve.prompts.tokenizers import PromptTokenizer

HEAVY = 1.6
"""Above it a weight tends to burn the picture rather than to stress the word."""
PIECES = 5
"""A word that a vocabulary spells in so many tokens or more is hardly a word to it."""
_SHOWN = 5
"""Most words that one piece of advice names."""
_ROUNDED = 1e-6
_PHRASE_END = re.compile(r"[,.;:|\n]+")
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_FILLERS = frozenset(
    {"a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "in", "into", "is", "it", "its", "no", "not", "of"}
    | {"off", "on", "onto", "or", "over", "some", "that", "the", "their", "this", "to", "very", "with", "without"}
)
_A1111 = re.compile(r"\([^()\n]*:\s*[0-9.]+\)|\[[^\[\]\n]*[:|][^\[\]\n]*\]")
_COMPEL = re.compile(r"[\w)](?:\+\+|--)(?!\w)")


def notes_on(request: TextRequest) -> tuple[Note, ...]:
    """What the texts of a request, which can be read, are read as."""
    sides = (("prompt", request.prompt), ("negative_prompt", request.negative_prompt or ""))
    # Weights that are to add up stand in `.blend()` alone, and most prompts have none.
    blended = [(field, text) for field, text in sides if ".blend" in text and request.syntax is not Syntax.PLAIN]
    return tuple(note for field, text in blended for note in _uneven(field, parse(text, field, request.syntax)))


def advice_on(
    request: TextRequest, plan: PromptPlan, tokenizers: Mapping[str, PromptTokenizer], *, guided: bool
) -> tuple[Note, ...]:
    """`plan` is the request's, `tokenizers` are the model's by role. `guided`: steps read the negative prompt."""
    found: list[Note] = []
    for field, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        if text is None:
            continue
        found += _other_syntax(field, text, request.syntax)
        found += _never(field, parse(text, field, request.syntax), request.num_inference_steps)
        found += _weights(field, plan)
        found += _lengths(field, plan)
        found += _strange(field, plan, tokenizers)
    found += _contradictions(plan)
    if request.negative_prompt and not guided:
        found.append(Note(field="negative_prompt", code="unread", message="without guidance no step reads it"))
    return tuple(found)


def _uneven(field: str, prompt: Prompt) -> Iterator[Note]:
    for blend in _wholes(prompt):
        if not isinstance(blend, Blend) or not blend.normalize:
            continue
        weights = [part.weight for part in blend.parts]
        total = sum(weights)
        if abs(total - 1) > _ROUNDED and total:
            shares = ", ".join(f"{weight / total:.3g}" for weight in weights)
            written = ", ".join(f"{weight:g}" for weight in weights)
            told = f"the weights {written} of a blend add up to {total:g}; they are read as {shares}"
            yield Note(field=field, code="normalized", message=told)


def _other_syntax(field: str, text: str, syntax: Syntax) -> Iterator[Note]:
    """Brackets and signs that this syntax has no meaning for are drawn as text."""
    for other, sign in ((Syntax.A1111, _A1111), (Syntax.COMPEL, _COMPEL)):
        met = sign.search(text) if syntax is not other else None
        if met and not (syntax is Syntax.COMPEL and met.group().startswith("(")):  # Compel has (words:1.2) as well
            told = f"{_short(met.group())!r} at character {met.start() + 1} is text in {syntax}; {other} would read it"
            yield Note(field=field, code="syntax", message=f"{told} (prompt_syntax)")


def _never(field: str, prompt: Prompt, steps: int) -> Iterator[Note]:
    """Changes at the very end or before the beginning, which no step sees."""
    for word in _words(prompt):
        if isinstance(word, Switch):
            at = word.when.step(steps)
            if at <= 0:
                yield _unseen(field, word.when, word.before, f"switches before the first of {steps} steps")
            elif at >= steps:
                yield _unseen(field, word.when, word.after, f"never switches in {steps} steps")
        elif isinstance(word, Ramp) and word.end.step(steps) - word.begin.step(steps) < 2 <= steps:
            told = f"a ramp from {_spelled(word.begin)} to {_spelled(word.end)} of {steps} steps is a switch"
            yield Note(field=field, code="schedule", message=told)


def _unseen(field: str, when: When, lost: Sequence[Word], told: str) -> Note:
    words = " ".join(" ".join(_plain(lost)).split())
    unseen = f"; nothing is drawn of {_short(words)!r}" if words else ""
    return Note(field=field, code="schedule", message=f"[from:to:{_spelled(when)}] {told}{unseen}")


def _weights(field: str, plan: PromptPlan) -> Iterator[Note]:
    spans = {span: None for text in plan.of(field) for span in _spans(text) if span.text.strip() or span.concept}
    heavy = [span for span in spans if span.weight > HEAVY]
    if heavy:
        told = f"{_told(heavy)}: above {HEAVY:g} a weight tends to burn the picture rather than to stress the words"
        yield Note(field=field, code="heavy", message=told)
    below = [span for span in spans if span.weight < 0]
    if below:
        told = f"{_told(below)}: what is not to be seen belongs into the negative prompt"
        yield Note(field=field, code="negative_weight", message=told)


def _lengths(field: str, plan: PromptPlan) -> Iterator[Note]:
    for cut in plan.truncated:
        if cut.field == field:
            told = f"{cut.tokens - cut.limit} of {cut.tokens} tokens don't fit into {cut.encoder}: {_short(cut.text)!r}"
            yield Note(field=field, code="cut", message=told)
    split = dict.fromkeys(
        (each.encoder, each.chunks) for each in plan.tokens if each.field == field and each.chunks > 1
    )
    if split:
        told = ", ".join(f"{chunks} rows of {encoder}" for encoder, chunks in split)
        message = f"it takes {told}; words of one row don't see those of another, so BREAK belongs between thoughts"
        yield Note(field=field, code="long", message=message)


def _strange(field: str, plan: PromptPlan, tokenizers: Mapping[str, PromptTokenizer]) -> Iterator[Note]:
    words = dict.fromkeys(word for text in plan.of(field) for span in _spans(text) for word in _WORD.findall(span.text))
    for role in dict.fromkeys(each.role for each in plan.tokens if each.field == field):
        tokenizer, name = tokenizers[role], next(each.encoder for each in plan.tokens if each.role == role)
        read = {word: tokenizer.tokenize(word).ids for word in words}
        unknown = [word for word, ids in read.items() if tokenizer.unknown is not None and tokenizer.unknown in ids]
        if unknown:
            message = f"{_listed(unknown)}: not in the vocabulary of {name}"
            yield Note(field=field, code="unknown", message=message)
        rare = [word for word, ids in read.items() if len(ids) >= PIECES and word not in unknown]
        if rare:
            pieces = f"{name} spells it in {len(read[rare[0]])} pieces" if len(rare) == 1 else f"{name} spells them"
            yield Note(field=field, code="rare", message=f"{_listed(rare)}: {pieces}; is it written right?")


def _contradictions(plan: PromptPlan) -> Iterator[Note]:
    """Phrases of the negative prompt all of whose words the prompt has."""
    wanted = {word for text in plan.of("prompt") for span in _spans(text) if span.weight > 0 for word in _said(span)}
    both: dict[str, None] = {}
    for text in plan.of("negative_prompt"):
        whole = "".join(span.text for span in _spans(text) if span.weight > 0)
        for phrase in _PHRASE_END.split(whole):
            words = set(_content(phrase))
            if words and words <= wanted:
                both[" ".join(phrase.split())] = None
    if both:
        message = f"{_listed(list(both))}: the prompt asks for it too"
        yield Note(field="negative_prompt", code="contradiction", message=message)


def _spans(text: TextPlan) -> Iterator[Span]:
    return (each for each in text.flat if not isinstance(each, Break))


def _said(span: Span) -> list[str]:
    return _content(span.text) + ([span.concept.lower()] if span.concept else [])


def _content(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.lower()) if word not in _FILLERS]


def _wholes(prompt: Prompt) -> Iterator[Prompt]:
    """The prompt and all whole prompts in it."""
    yield prompt
    if isinstance(prompt, (Blend, Conjunction, Composition)):
        for part in prompt.parts:
            yield from _wholes(part.prompt)
    elif isinstance(prompt, Scheduled):
        yield from _wholes(prompt.base)
        for entry in prompt.entries:
            yield from _wholes(entry.prompt)


def _words(prompt: Prompt) -> Iterator[Word]:
    """All words in it, however deep."""
    left = [word for whole in _wholes(prompt) if isinstance(whole, tuple) for word in whole]
    while left:
        word = left.pop()
        yield word
        left += _inside(word)


def _inside(word: Word) -> tuple[Word, ...]:
    match word:
        case Weighted(words=words):
            return words
        case Switch(before=before, after=after) | Ramp(before=before, after=after):
            return (*before, *after)
        case Alternate(options=options):
            return tuple(each for option in options for each in option)
    return ()


def _plain(words: Sequence[Word]) -> Iterator[str]:
    """The text in it, in the order in which it is written."""
    for word in words:
        if isinstance(word, Text):
            yield word.text
        elif isinstance(word, Concept):
            yield f"<{word.name}>"
        else:
            yield from _plain(_inside(word))


def _spelled(when: When) -> str:
    return f"{when.value:g}" if not when.share or when.value < 1 else f"{when.value:.1f}"


def _told(spans: Sequence[Span]) -> str:
    return _listed([f"{_short(span.concept or span.text.strip(' ,'))} ({span.weight:.3g})" for span in spans])


def _listed(words: Sequence[str]) -> str:
    shown = ", ".join(_short(word) for word in words[:_SHOWN])
    return shown if len(words) <= _SHOWN else f"{shown} and {len(words) - _SHOWN} more"


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
