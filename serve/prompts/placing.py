"""Texts in the rows of every encoder -> texts in their place of one context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serve.domain.text import TextRequest
from serve.errors import InvalidRequest
from serve.prompts.flats import Flat
from serve.prompts.planned import Block, TextPlan
from serve.prompts.readers import Laid

MAX_CONTEXT = 1 << 15
"""Tokens of the contexts of one request's texts together: 64 texts of FLUX's."""


@dataclass(frozen=True, slots=True)
class Draft:
    """One text of the request's `field`, in the rows of every encoder; `slot` is its place in `.and()`. Nothing is laid
    out for one that is `zero`."""

    field: str
    flat: Flat
    slot: int
    laid: tuple[Laid, ...]
    zero: bool = False

    @property
    def blocks(self) -> tuple[tuple[Laid, ...], tuple[Laid, ...]]:
        """What goes into the context: CLIPs, whose rows lie side by side, and a T5, whose rows lie below theirs."""
        context = [each for each in self.laid if each.reader.context is not None]
        return tuple(each for each in context if not each.reader.is_t5), tuple(
            each for each in context if each.reader.is_t5
        )

    @property
    def heights(self) -> tuple[int, int]:
        """Tokens of the context that each block takes up."""
        beside, below = (max((each.height for each in block), default=0) for block in self.blocks)
        return beside, below


def place(drafts: Sequence[Draft], request: TextRequest) -> tuple[TextPlan, ...]:
    """Contexts of one shape. The places of `.and()` are as high as the highest text of the field in each; below the
    last one, and in a place that is higher than a text, the empty text's rows follow where rows are padded, else zeros.

    Raises InvalidRequest where that is more than MAX_CONTEXT tokens in all.
    """
    heights = {field: _heights(drafts, field) for field in dict.fromkeys(draft.field for draft in drafts)}
    totals = tuple(max(sum(slots) for slots in each) for each in zip(*heights.values(), strict=True))
    check_size(len(drafts), sum(totals), "prompt")
    return tuple(_placed(draft, heights[draft.field], totals, request) for draft in drafts)


def check_size(texts: int, tokens: int, field: str) -> None:
    """Raises InvalidRequest where so many texts of so many tokens are more than a request may have."""
    if texts * tokens > MAX_CONTEXT:
        told = f"its steps read {texts} texts of {tokens} tokens, and in all {MAX_CONTEXT} are possible"
        raise InvalidRequest(f"{field}: {told}", field)


def _heights(drafts: Sequence[Draft], field: str) -> tuple[list[int], ...]:
    """Of each block, the height of each place."""
    own = [draft for draft in drafts if draft.field == field]
    slots: tuple[list[int], ...] = tuple([0] * (1 + max(draft.slot for draft in own)) for _ in range(2))
    for draft in own:
        for heights, height in zip(slots, draft.heights, strict=True):
            heights[draft.slot] = max(heights[draft.slot], height)
    return slots


def _placed(draft: Draft, slots: tuple[list[int], ...], totals: tuple[int, ...], request: TextRequest) -> TextPlan:
    if draft.zero:
        return TextPlan(draft.field, draft.flat, slot=draft.slot, zero=True)
    blocks = []
    for block, heights, total in zip(draft.blocks, slots, totals, strict=True):
        if block:
            top = sum(heights[: draft.slot])
            bottom = total if draft.slot == len(heights) - 1 else top + heights[draft.slot]
            columns = tuple(each.column(request, draft.field, bottom - top) for each in block)
            blocks.append(Block(columns, total, top))
    vectors = (
        each.vector(output, request.salt) for each in draft.laid for output in each.reader.vectors if not draft.slot
    )
    return TextPlan(draft.field, draft.flat, tuple(blocks), tuple(vectors), draft.slot)
