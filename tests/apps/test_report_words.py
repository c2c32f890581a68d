"""Words of the report: the text stays what it is, tokens find their words."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from segcompass.apps.report_words import Words, align_words, locate
from segcompass.io.readings import ConceptWeight, TokenActivation
from segcompass.types import TokenKind

TEXTS = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=50)


def reading(position: int, text: str, total: float = 1.0) -> TokenActivation:
    concepts = (ConceptWeight(position, total),)
    return TokenActivation(position, text, TokenKind.THOUGHT, total, concepts)


@given(TEXTS, st.lists(TEXTS, max_size=12))
def test_segments_are_exactly_the_text(text: str, tokens: list[str]) -> None:
    words = Words()
    segments = align_words(text, [reading(i, token) for i, token in enumerate(tokens)], words)
    assert "".join(segment.text for segment in segments) == text
    numbers = [segment.word for segment in segments if segment.word is not None]
    assert numbers == list(range(len(words.concepts)))
    assert all(0 <= segment.shade <= 1 for segment in segments)
    if numbers:
        assert sorted(words.of_token) == list(range(len(tokens)))  # no reading is lost


def test_pieces_meet_in_their_word_which_takes_the_strongest() -> None:
    words = Words()
    readings = [
        reading(10, "the", 1.0),
        reading(11, " um", 4.0),
        reading(12, "brella", 2.0),
        reading(13, ".", 1.0),
    ]
    segments = align_words("the umbrella.", readings, words)
    assert [s.text for s in segments] == ["the", " ", "umbrella", "."]
    assert [s.shade for s in segments if s.word is not None] == [0.25, 1.0, 0.25]
    assert words.of_token == {10: 0, 11: 1, 12: 1, 13: 2}
    assert words.concepts[1] == ((11, 4.0),)  # as many concepts as a token lists


def test_numbers_go_on_through_the_texts_of_a_card() -> None:
    words = Words()
    align_words("red mug", [reading(0, "red"), reading(1, " mug")], words)
    second = align_words("a mug", [reading(5, "a"), reading(6, " mug")], words)
    assert [s.word for s in second if s.word is not None] == [2, 3]
    assert words.of_token == {0: 0, 1: 1, 5: 2, 6: 3}


def test_marks_of_tokenizers_and_partial_characters() -> None:
    assert locate("der Becher", ["der", "ĠBecher"]) == [0, 4]
    assert locate("der Becher", ["▁der", "▁Becher"]) == [0, 4]
    # An emoji of four byte tokens stays where it is, and the word after it is found again.
    assert locate("a 🫖 pot", ["a", "\ufffd", "\ufffd", "\ufffd", "\ufffd", " pot"])[-1] == 4


def test_scripts_without_spaces_are_read_by_character() -> None:
    segments = align_words("红色的杯子。", [], Words())
    assert [s.text for s in segments] == list("红色的杯子。")
