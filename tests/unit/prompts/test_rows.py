import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.domain.text import FIRST_CONCEPT_ID, LongPrompt
from serve.prompts.ast import Break
from serve.prompts.chunks import cut, part
from serve.prompts.concepts import ConceptRef
from serve.prompts.flats import Flat, Span
from serve.prompts.parse import parse
from serve.prompts.rows import Reading, TextRow, lay_out, lowered, read
from serve.prompts.timeline import timeline
from serve.prompts.tokenizers import PromptTokenizer
from serve.prompts.wanted import NO_WORDS


def flat_of(prompt: str) -> Flat:
    (flat,) = timeline(parse(prompt), 1).texts
    return flat


def rows_of(
    tokenizer: PromptTokenizer, reading: Reading, length: int, policy: LongPrompt = LongPrompt.HEAD, padded: bool = True
) -> tuple[TextRow, ...]:
    parts = part(reading.tokens, tokenizer.room(length), policy, "prompt", "")
    return lay_out(tokenizer, reading, parts, length, padded=padded)


def head_of(tokenizer: PromptTokenizer, prompt: str | Flat, length: int, *, padded: bool = True) -> TextRow:
    (row,) = rows_of(
        tokenizer, read(tokenizer, flat_of(prompt) if isinstance(prompt, str) else prompt), length, padded=padded
    )
    return row


def weighted_words(tokenizer: PromptTokenizer, prompt: str, length: int) -> list[tuple[int, float]]:
    row = head_of(tokenizer, prompt, length)
    assert len(row.token_ids) == length
    used = len(row.tokens)
    weights = row.weights or (1.0,) * length
    assert set(weights[: row.at]) | set(weights[row.at + used :]) <= {1.0}
    return list(zip(row.token_ids, weights, strict=True))[row.at : row.at + used]


def ids(tokenizer: PromptTokenizer, text: str) -> list[int]:
    return list(tokenizer.tokenize(text).ids)


def test_t5_weights_lie_on_the_words(t5: PromptTokenizer) -> None:
    """The space before a word belongs to its token, but the word decides the weight."""
    expected = [*[(i, 1.0) for i in ids(t5, "a")], *[(i, 1.5) for i in ids(t5, "red circle")]]
    expected += [(i, 1.0) for i in ids(t5, "on blue")]
    assert weighted_words(t5, "a (red circle:1.5) on blue", 64) == expected
    assert weighted_words(t5, "a( red circle:1.5) on blue", 64) == expected


def test_t5_tokens_across_a_weight_take_that_of_their_first_character(t5: PromptTokenizer) -> None:
    assert len(ids(t5, "circle")) == 1
    assert weighted_words(t5, "cir(cle:1.5)", 16) == [(ids(t5, "circle")[0], 1.0)]
    assert weighted_words(t5, "(cir:1.5)cle", 16) == [(ids(t5, "circle")[0], 1.5)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(), st.sampled_from([1.0, 0.5, 1.3])), max_size=8), st.sampled_from([2, 16, 77]))
def test_weights_never_change_t5s_tokens(t5: PromptTokenizer, parts: list[tuple[str, float]], length: int) -> None:
    plain = read(t5, tuple(Span(text, 1.0) for text, _ in parts))
    weighted = read(t5, tuple(Span(text, weight) for text, weight in parts))
    assert plain.weights is None
    assert weighted.tokens == plain.tokens
    assert set(weighted.weights or ()) <= {1.0, *(weight for _, weight in parts)}
    rows = [rows_of(t5, reading, length) for reading in (plain, weighted)]
    assert [row.token_ids for row in rows[0]] == [row.token_ids for row in rows[1]]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["red", "blue,", "x", "é", "star's", "qqq"]), min_size=1, max_size=40), st.data())
def test_weights_on_whole_words_never_change_tokens(
    tokenizer: PromptTokenizer, t5: PromptTokenizer, words: list[str], data: st.DataObject
) -> None:
    """The weight is on the words that it was written on, in both vocabularies."""
    factors = data.draw(st.lists(st.sampled_from([1.0, 0.5, 1.3]), min_size=len(words), max_size=len(words)))
    prompt = " ".join(f"({word}:{factor})" for word, factor in zip(words, factors, strict=True))
    for reader in (tokenizer, t5):
        expected = [(token, factor) for word, factor in zip(words, factors, strict=True) for token in ids(reader, word)]
        assert weighted_words(reader, prompt, 77) == expected[: reader.room(77)]
        if all(factor == 1.0 for factor in factors):
            assert head_of(reader, prompt, 77).weights is None


def test_weights_on_text_that_was_cut_are_no_weights(tokenizer: PromptTokenizer, t5: PromptTokenizer) -> None:
    for reader in (tokenizer, t5):
        row = head_of(reader, "red " * 100 + "(blue:1.5)", 77)
        assert (row.weights, row.fragments) == (None, ())
        assert row.token_ids == head_of(reader, "red " * 101, 77).token_ids


@pytest.mark.parametrize("length", [1, 3, 4, 16])
def test_a_row_without_padding_is_the_padded_one_up_to_its_end(t5: PromptTokenizer, length: int) -> None:
    for prompt in ("red blue", "a (red:1.5) (blue:0.5) star", ""):
        whole, row = head_of(t5, prompt, length), head_of(t5, prompt, length, padded=False)
        end = len(whole.tokens) + 1
        assert row.token_ids == whole.token_ids[:end]
        assert row.weights == (None if whole.weights is None else whole.weights[:end])
        assert row.fragments == whole.fragments[:end]
        assert row.tokens == whole.tokens


def test_a_t5_row_of_one_token_is_its_end(t5: PromptTokenizer) -> None:
    reading = read(t5, flat_of("(red:1.2) blue"))
    (row,) = rows_of(t5, reading, 1)
    assert (row.token_ids, row.weights, row.tokens) == ((t5.eos,), None, range(0))
    assert cut(reading.tokens, [row.tokens]) == (len(reading.tokens.ids), "red blue")


def test_rows_are_the_text_one_below_the_other(tokenizer: PromptTokenizer, t5: PromptTokenizer) -> None:
    """Each with its begin, end and padding, and the weights that its own words have."""
    prompt = "a (red circle:1.5), " * 40
    for reader in (tokenizer, t5):
        reading = read(reader, flat_of(prompt))
        rows = rows_of(reader, reading, 77, LongPrompt.CHUNK)
        assert len(rows) > 1
        inside = [row.token_ids[row.at : row.at + len(row.tokens)] for row in rows]
        assert sum(inside, ()) == reading.tokens.ids
        for row, words in zip(rows, inside, strict=True):
            assert row.token_ids == reader.row(words, 77)
            assert row.weights is not None
            assert row.weights[row.at : row.at + len(words)] == reading.weights[row.tokens.start : row.tokens.stop]


def test_fragments_are_numbered_through_the_whole_text(tokenizer: PromptTokenizer) -> None:
    """Words that are parted by the end of a row stay one fragment."""
    reading = read(tokenizer, (Span(", " * 70, 1.0), Span("; " * 10, 1.5), Span(", ", 1.0)))
    first, second = rows_of(tokenizer, reading, 77, LongPrompt.CHUNK)
    assert first.fragments == (NO_WORDS, *(0,) * 70, *(1,) * 5, NO_WORDS)
    assert second.fragments == (NO_WORDS, *(1,) * 5, 2, *(NO_WORDS,) * 70)


CAT, DOG = ConceptRef("digest-of-cat", 3), ConceptRef("digest-of-dog", 2)
REFS = {"cat": CAT, "dog": DOG, "nothing": None}


def named(*parts: str | Span | Break) -> Flat:
    return tuple(
        Span(each, 1.0, each[1:-1] if each.startswith("<") else None) if isinstance(each, str) else each
        for each in parts
    )


def test_the_vectors_of_a_concept_stand_in_its_place(tokenizer: PromptTokenizer, t5: PromptTokenizer) -> None:
    for reader in (tokenizer, t5):
        reading = read(reader, named("a ", "<dog>", " on ", "<cat>", " and ", "<dog>"), REFS)
        (row,) = rows_of(reader, reading, 77)
        dog, cat = [FIRST_CONCEPT_ID, FIRST_CONCEPT_ID + 1], [FIRST_CONCEPT_ID + number for number in (2, 3, 4)]
        words = [*ids(reader, "a"), *dog, *ids(reader, "on"), *cat, *ids(reader, "and"), *dog]
        assert list(row.token_ids[row.at : row.at + len(row.tokens)]) == words
        assert row.concepts == (DOG.digest, CAT.digest)
        assert reading.tokens.text == "a <dog> on <cat> and <dog>"


def test_a_concept_without_vectors_for_an_encoder_reads_nothing_there(tokenizer: PromptTokenizer) -> None:
    reading = read(tokenizer, named("a ", "<nothing>", " circle"), REFS)
    assert reading.tokens.ids == tokenizer.tokenize("a circle").ids
    assert rows_of(tokenizer, reading, 77)[0].concepts == ()


def test_each_row_counts_its_own_concepts(tokenizer: PromptTokenizer) -> None:
    """The same row has the same ids, whatever stands in the rows before it."""
    reading = read(tokenizer, named("<cat>", Break(), "a ", "<dog>", Break(), "<dog>", "<cat>"), REFS)
    rows = rows_of(tokenizer, reading, 77, LongPrompt.CHUNK)
    assert [row.concepts for row in rows] == [(CAT.digest,), (DOG.digest,), (DOG.digest, CAT.digest)]
    (alone,) = rows_of(tokenizer, read(tokenizer, named("a ", "<dog>"), REFS), 77)
    assert (rows[1].token_ids, rows[1].concepts) == (alone.token_ids, alone.concepts)


def test_a_concept_is_weighted_like_words(tokenizer: PromptTokenizer, t5: PromptTokenizer) -> None:
    for reader in (tokenizer, t5):
        reading = read(reader, (Span("a ", 1.0), Span("<cat>", 1.5, "cat"), Span(" b", 1.0)), REFS)
        assert reading.weights == (*(1.0,) * len(ids(reader, "a")), *(1.5,) * 3, *(1.0,) * len(ids(reader, "b")))


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(alphabet="aÉİΣσ ß\n x") | st.text(), st.sampled_from([1.0, 0.5])), max_size=6))
def test_small_letters_are_those_of_the_whole_text(parts: list[tuple[str, float]]) -> None:
    spans = tuple(Span(text, weight) for text, weight in parts)
    text = "".join(span.text for span in spans)
    low = lowered(spans)
    assert "".join(span.text for span in low if isinstance(span, Span)) == text.lower().strip()
    assert all(isinstance(span, Span) and span.text for span in low)


def test_small_letters_keep_their_weights() -> None:
    """A capital may become two letters, and a Greek sigma depends on what follows it."""
    spans = (Span("  İİ", 1.5), Span("ΟΔΟΣ", 1.0), Span("Σ ", 0.5), Span(" ", 2.0))
    assert lowered(spans) == (Span("i\u0307i\u0307", 1.5), Span("οδοσ", 1.0), Span("ς", 0.5))
    assert lowered((Span(" ", 2.0),)) == ()


def test_the_names_of_concepts_keep_their_letters() -> None:
    flat = (Span(" A ", 1.0), Span("<Cat>", 1.0, "Cat"), Span(" B ", 1.0), Break(), Span(" C ", 1.0))
    assert lowered(flat) == (Span("a ", 1.0), Span("<Cat>", 1.0, "Cat"), Span(" b ", 1.0), Break(), Span(" c", 1.0))
