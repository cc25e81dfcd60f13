import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.domain.text import LongPrompt
from serve.errors import InvalidRequest
from serve.prompts.ast import Break
from serve.prompts.chunks import BACKTRACK, MAX_ROWS, Tokenized, cut, part
from serve.prompts.concepts import ConceptRef
from serve.prompts.flats import Flat, Span
from serve.prompts.rows import read
from serve.prompts.tokenizers import PromptTokenizer

ROOM = 75
CHUNK, WINDOW, HEAD, TAIL = LongPrompt.CHUNK, LongPrompt.WINDOW, LongPrompt.HEAD, LongPrompt.TAIL


def tokens_of(tokenizer: PromptTokenizer, *parts: str | Span | Break) -> Tokenized:
    flat: Flat = tuple(Span(each, 1.0) if isinstance(each, str) else each for each in parts)
    names = {each.concept for each in flat if isinstance(each, Span) and each.concept}
    return read(tokenizer, flat, {name: ConceptRef(name, int(name)) for name in names}).tokens


def rows_of(tokens: Tokenized, policy: LongPrompt = CHUNK, room: int = ROOM) -> list[str]:
    return [tokens.told(row.start, row.stop) for row in part(tokens, room, policy, "prompt", "clip-l")]


def concept(vectors: int) -> Span:
    return Span(f"<{vectors}>", 1.0, str(vectors))


def test_a_row_ends_behind_the_last_phrase(tokenizer: PromptTokenizer, t5: PromptTokenizer) -> None:
    for reader, room in ((tokenizer, ROOM), (t5, 63)):
        words = (room - 8) // len(reader.tokenize("x").ids)
        text = "x " * words + "x, x, x x x x x x x x x x"
        tokens = tokens_of(reader, text)
        rows = part(tokens, room, CHUNK, "prompt", "")
        assert tokens.told(rows[0].start, rows[0].stop) == ("x " * words + "x, x,")
        assert " ".join(rows_of(tokens, room=room)) == text


def test_a_phrase_that_ends_too_early_in_a_row_does_not_end_it(tokenizer: PromptTokenizer) -> None:
    """`comma_padding_backtrack`: a row is not left a quarter empty."""
    at = ROOM - BACKTRACK
    for spare, expected in ((0, ROOM), (1, at + 1)):
        tokens = tokens_of(tokenizer, "( " * (at - 1 + spare) + ", " + "( " * 200)
        assert len(tokens.ids) == at + spare + 200
        assert part(tokens, ROOM, CHUNK, "prompt", "")[0] == range(expected)


@pytest.mark.parametrize("mark", [",", ".", ";", ":", "、", "。"])
def test_phrases_end_with_these_marks(tokenizer: PromptTokenizer, mark: str) -> None:
    words = 60
    tokens = tokens_of(tokenizer, "(" + " (" * (words - 1) + f"{mark} " + "( " * 40)
    end = len(read(tokenizer, (Span("( " * words + mark, 1.0),)).tokens.ids)
    assert part(tokens, ROOM, CHUNK, "prompt", "")[0] == range(end)


def test_a_point_in_a_number_ends_no_phrase(tokenizer: PromptTokenizer) -> None:
    tokens = tokens_of(tokenizer, "( " * 70 + "3.5 " + "( " * 40)
    first, *_ = part(tokens, ROOM, CHUNK, "prompt", "")
    assert not tokens.told(first.start, first.stop).endswith(".")


def test_a_word_is_never_split_where_a_row_can_hold_it(tokenizer: PromptTokenizer) -> None:
    word = "quxquuxcorge"
    assert 3 < len(tokenizer.tokenize(word).ids) < ROOM
    told = rows_of(tokens_of(tokenizer, " ".join([word] * 100)))
    assert len(told) > 1
    assert all(set(row.split()) == {word} for row in told)


def test_a_word_that_is_longer_than_a_row_is_split(tokenizer: PromptTokenizer) -> None:
    text = "xyz" * 100
    told = rows_of(tokens_of(tokenizer, "a " + text))
    assert told[0] == "a"
    assert len(told) > 2
    assert "".join(told[1:]) == text


def test_a_break_begins_a_row_of_clip_and_is_a_space_to_t5(tokenizer: PromptTokenizer, t5: PromptTokenizer) -> None:
    parts = "a red", Break(), "blue", Break(), "  "
    assert rows_of(tokens_of(tokenizer, *parts)) == ["a red", "blue"]
    assert rows_of(tokens_of(t5, *parts)) == ["a red blue"]
    assert tokens_of(t5, *parts).ids == tokens_of(t5, "a red blue").ids


def test_t5_parts_a_long_text_at_a_break_first(t5: PromptTokenizer) -> None:
    tokens = tokens_of(t5, "red " * 20, Break(), "a, blue, star, moon ", Break(), "x " * 30)
    assert rows_of(tokens, room=60) == ["red " * 20 + " a, blue, star, moon", ("x " * 30).strip()]


def test_a_concept_is_never_split_where_a_row_can_hold_it(tokenizer: PromptTokenizer, t5: PromptTokenizer) -> None:
    for reader in (tokenizer, t5):
        for policy in (CHUNK, WINDOW):
            tokens = tokens_of(reader, "( " * 70, concept(30), "( " * 70, concept(60), concept(75))
            rows = part(tokens, ROOM, policy, "prompt", "")
            assert all(not {row.start, row.stop} & tokens.glued for row in rows)
            assert all(0 < len(row) <= ROOM for row in rows)
            assert cut(tokens, rows) == (0, "")
        words = "( " * (70 // len(reader.tokenize("(").ids))
        before, behind = tokens_of(reader, words, concept(30)), tokens_of(reader, concept(30), words)
        assert ROOM - 30 < len(before.ids) - 30 < ROOM
        assert part(before, ROOM, HEAD, "prompt", "") == (range(len(before.ids) - 30),)
        assert part(behind, ROOM, TAIL, "prompt", "") == (range(30, len(behind.ids)),)
    longer = part(tokens_of(tokenizer, concept(100)), ROOM, CHUNK, "prompt", "")
    assert longer == (range(75), range(75, 100))


def test_windows_overlap_by_a_third(tokenizer: PromptTokenizer) -> None:
    tokens = tokens_of(tokenizer, ", " * 180)
    assert part(tokens, ROOM, WINDOW, "prompt", "") == (range(75), range(50, 125), range(100, 175), range(150, 180))
    assert part(tokens_of(tokenizer, ", " * 75), ROOM, WINDOW, "prompt", "") == (range(75),)


def test_windows_do_not_reach_across_a_break(tokenizer: PromptTokenizer) -> None:
    tokens = tokens_of(tokenizer, ", " * 80, Break(), "; " * 10)
    assert part(tokens, ROOM, WINDOW, "prompt", "") == (range(75), range(50, 80), range(80, 90))


def test_head_and_tail_keep_what_fits_and_tell_the_rest(tokenizer: PromptTokenizer) -> None:
    words = [str(number % 10) for number in range(80)]
    tokens = tokens_of(tokenizer, " ".join(words))
    assert len(tokens.ids) == 80
    head = part(tokens, ROOM, HEAD, "prompt", "")
    assert (head, cut(tokens, head)) == ((range(75),), (5, " ".join(words[75:])))
    tail = part(tokens, ROOM, TAIL, "prompt", "")
    assert (tail, cut(tokens, tail)) == ((range(5, 80),), (5, " ".join(words[:5])))


def test_head_cuts_each_part_between_breaks_by_itself(tokenizer: PromptTokenizer) -> None:
    tokens = tokens_of(tokenizer, ", " * 76, Break(), "; " * 77)
    rows = part(tokens, ROOM, HEAD, "prompt", "")
    assert rows == (range(75), range(76, 151))
    assert cut(tokens, rows) == (3, ", ; ;")


def test_what_is_too_long_can_be_refused(tokenizer: PromptTokenizer) -> None:
    for text in (", " * 75, ", " * 75 + "  "):
        assert len(part(tokens_of(tokenizer, text), ROOM, LongPrompt.ERROR, "prompt", "clip-l")) == 1
    with pytest.raises(InvalidRequest) as raised:
        part(tokens_of(tokenizer, ", " * 76), ROOM, LongPrompt.ERROR, "negative_prompt", "clip-l")
    assert raised.value.param == "negative_prompt"
    assert raised.value.message == (
        "negative_prompt: 76 tokens are more than the 75 that clip-l reads (long_prompt is error)"
    )


def test_more_rows_than_anybody_needs_are_refused(tokenizer: PromptTokenizer) -> None:
    assert len(part(tokens_of(tokenizer, ", " * 75 * MAX_ROWS), ROOM, CHUNK, "prompt", "clip-l")) == MAX_ROWS
    tokens = tokens_of(tokenizer, ", " * (75 * MAX_ROWS + 1))
    with pytest.raises(InvalidRequest, match=f"prompt: 4801 tokens are {MAX_ROWS + 1} rows of clip-l"):
        part(tokens, ROOM, CHUNK, "prompt", "clip-l")
    assert len(part(tokens, ROOM, HEAD, "prompt", "clip-l")) == 1


@pytest.mark.parametrize("policy", LongPrompt)
def test_an_empty_text_is_one_row_and_no_room_is_an_empty_row(t5: PromptTokenizer, policy: LongPrompt) -> None:
    assert part(tokens_of(t5, " "), ROOM, policy, "prompt", "") == (range(0),)
    tokens = tokens_of(t5, "red blue")
    if policy is LongPrompt.ERROR:
        with pytest.raises(InvalidRequest):
            part(tokens, 0, policy, "prompt", "")
    else:
        (row,) = part(tokens, 0, policy, "prompt", "")
        assert (len(row), cut(tokens, (row,))) == (0, (2, "red blue"))


WORDS = st.sampled_from(["red", "blue,", "x.", "3.5", "é", "star's", "qqq", ";", "緑", "😀", "well-known"])
PARTS = st.lists(WORDS.map(lambda word: f"{word} ") | st.just(Break()) | st.just(concept(4)), max_size=60)


@settings(deadline=None)
@given(PARTS, st.sampled_from([5, 8, 20]), st.sampled_from([CHUNK, WINDOW, LongPrompt.HIERARCHICAL]))
def test_every_token_is_in_a_row_and_no_row_is_too_long(
    tokenizer: PromptTokenizer, t5: PromptTokenizer, parts: list[str | Span | Break], room: int, policy: LongPrompt
) -> None:
    for reader in (tokenizer, t5):
        tokens = tokens_of(reader, *parts)
        try:
            rows = part(tokens, room, policy, "prompt", "")
        except InvalidRequest:
            assert len(tokens.ids) > MAX_ROWS
            continue
        assert all(len(row) <= room for row in rows)
        assert cut(tokens, rows) == (0, "")
        assert [*dict.fromkeys(at for row in rows for at in row)] == [*range(len(tokens.ids))]
        assert all(before.stop < after.stop for before, after in pairwise(rows))
        if policy is not WINDOW:
            assert sum(map(len, rows)) == len(tokens.ids)
            assert not tokens.glued & {row.start for row in rows}


@settings(deadline=None)
@given(st.lists(WORDS, max_size=60), st.sampled_from([8, 20]), st.sampled_from([HEAD, TAIL]))
def test_what_is_read_and_what_is_cut_are_the_text(
    t5: PromptTokenizer, words: list[str], room: int, policy: LongPrompt
) -> None:
    tokens = tokens_of(t5, " ".join(words))
    rows = part(tokens, room, policy, "prompt", "")
    number, rest = cut(tokens, rows)
    kept = tokens.told(rows[0].start, rows[0].stop)
    assert number == len(tokens.ids) - len(rows[0])
    whole = kept + rest if policy is HEAD else rest + kept
    assert re.sub(r"\s", "", whole) == "".join(words)
