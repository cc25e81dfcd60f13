r"""A1111's prompt syntax, and what Tandem adds to it -> words.

    (x)  1.1 times        [x]  1/1.1 times        (x:1.5)  1.5 times        \( \) \[ \] \{ \} \| \: \\ \<  the character
    [from:to:when]  [to:when]  [from::when]       one, and from `when` on the other
    [a|b|c]                                       another one at each step, in turns
    BREAK                                         what follows begins a new row of a CLIP
    [from:to:begin-end]                           ours: from the one to the other in equal parts
    <name>                                        ours: a learned concept

The behaviour is what https://github.com/AUTOMATIC1111/stable-diffusion-webui documents in `parse_prompt_attention` and
`get_learned_conditioning_prompt_schedules`. A number below 1 or with a point in it is a share of the steps. What can't
be a change of words is text, as there: `[a:b]`, `[a:b:c:10]`, a bar outside of square brackets. Unlike there, a weight
may be written with an exponent, and one that is not finite is refused rather than drawn as a word.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serve.prompts.ast import Alternate, Break, Concept, Ramp, Switch, Word, Words
from serve.prompts.brackets import Brackets, Kind, Piece
from serve.prompts.building import WordsBuilder, power
from serve.prompts.places import Source, in_range


def read_words(source: Source) -> Words:
    """Words in normal form; empty text gives none. Time grows linearly with the text. Raises InvalidRequest."""
    return _Builder(source).build(Brackets(source).read())


@dataclass(slots=True)
class _Scope:
    """The text itself, or the inside of a change. Its words weigh what the brackets inside of it say, times `outside`
    (factor, steps), which lies on the change as a whole."""

    change: Piece | None = None
    outside: tuple[float, int] = (1.0, 0)
    builder: WordsBuilder = field(default_factory=WordsBuilder)
    done: list[Words] = field(default_factory=list)
    factors: list[float] = field(default_factory=lambda: [1.0])
    """Products of the round brackets' weights around here, outermost first."""
    steps: int = 0
    """Powers are counted, not multiplied out, so that ([x]) weighs exactly 1."""


class _Builder:
    """Owns: the scopes that are open, the innermost last."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._scopes = [_Scope()]

    def build(self, pieces: list[Piece]) -> Words:
        for piece in pieces:
            scope = self._scopes[-1]
            kind = piece.kind
            if kind is Kind.TEXT or kind is Kind.LITERAL:
                self._check(scope, piece)
                scope.builder.text(piece.text, scope.factors[-1], scope.steps)
            elif kind is Kind.OPEN:
                scope.steps += piece.steps
                if piece.round:
                    scope.factors.append(scope.factors[-1] * piece.factor)
            elif kind is Kind.CLOSE and piece.opening is not None:
                scope.steps -= piece.opening.steps
                if piece.opening.round:
                    scope.factors.pop()
            elif kind is Kind.CONCEPT:
                self._check(scope, piece)
                scope.builder.word(Concept(piece.text), scope.factors[-1], scope.steps)
            elif kind is Kind.BREAK:
                scope.builder.word(Break())
            elif kind is Kind.CHANGE:
                outer, steps = scope.outside
                self._scopes.append(_Scope(piece, (outer * scope.factors[-1], steps + scope.steps)))
            elif kind is Kind.NEXT:
                scope.done.append(scope.builder.finish())
                scope.builder = WordsBuilder()
            elif kind is Kind.END:
                self._end(self._scopes.pop())
        return self._scopes[-1].builder.finish()

    def _end(self, inner: _Scope) -> None:
        inner.done.append(inner.builder.finish())
        scope = self._scopes[-1]
        scope.builder.word(_change(inner), scope.factors[-1], scope.steps)

    def _check(self, scope: _Scope, piece: Piece) -> None:
        """What a word weighs in its scope, and in all: a change that weighs nothing must not hide what is beyond."""
        factor, steps = scope.factors[-1], scope.steps
        if steps or factor != 1.0:
            in_range(self._source, piece.at, power(factor, steps))
        outer, outer_steps = scope.outside
        if outer_steps or outer != 1.0:
            in_range(self._source, piece.at, power(outer * factor, outer_steps + steps))


def _change(scope: _Scope) -> Word:
    moments = scope.change.moments if scope.change is not None else ()
    if not moments:
        return Alternate(tuple(scope.done))
    before, after = scope.done if len(scope.done) == 2 else ((), scope.done[0])
    return Switch(before, after, moments[0]) if len(moments) == 1 else Ramp(before, after, *moments)
