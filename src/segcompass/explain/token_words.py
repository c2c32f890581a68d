"""What is known about the tokens of question and thought: words, their company, their sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from segcompass.data.scenes.catalog import CATEGORIES, COLOURS, SIZES, TEXTURES
from segcompass.explain.vocabulary import Feature
from segcompass.explain.words import Word, words
from segcompass.types import Prediction

_CATEGORY_OF = {form: c.name for c in CATEGORIES.values() for form in (c.name, c.plural)}
_CLASSES: dict[str, str] = {
    **dict.fromkeys(COLOURS, "colours"),
    **dict.fromkeys(_CATEGORY_OF, "categories"),
    **dict.fromkeys(SIZES, "sizes"),
    **dict.fromkeys(TEXTURES, "textures"),
    **{f"{row}{column}": "places" for row in "abcdefgh" for column in range(1, 9)},
}
_ENDS = (".", "?", "!")


class _Place(NamedTuple):
    """Where a word stands."""

    word: Word
    previous: str | None
    following: str | None
    opening: str  # the first two words of its sentence
    item: int  # which entry of a list, by commas; 1 is the first


def word_features(prediction: Prediction, *, looks: bool) -> Iterator[tuple[int, Feature]]:
    """Every (token, feature) of the words.

    Args:
        prediction: with its tokens.
        looks: whether the words are those of scenes, whose meaning is known.
    """
    for place in _places(prediction):
        for token in place.word.tokens:
            if len(place.word.tokens) > 1:
                piece = prediction.tokens[token].strip()
                yield token, Feature("piece", piece)
                yield token, Feature("piece in sentence", f"“{piece}” of {_sentence(place)}")
            yield from ((token, feature) for feature in _plain(place))
            if looks:
                yield from ((token, feature) for feature in _meant(place))
        if place.following is not None:
            last = place.word.tokens[-1]
            yield last, Feature("next", place.following)
            if looks and place.following in _CLASSES:
                yield last, Feature("next class", _CLASSES[place.following])


def _places(prediction: Prediction) -> Iterator[_Place]:
    spoken, kinds = words(prediction), prediction.token_kinds
    texts = [word.text for word in spoken]
    start, item = 0, 1
    for i, word in enumerate(spoken):
        before = texts[i - 1] if i else None
        same = i > 0 and kinds[word.tokens[0]] == kinds[spoken[i - 1].tokens[0]]
        if not same or before in _ENDS:
            start, item = i, 1
        opening = " ".join(texts[start : start + 2])
        yield _Place(word, before, texts[i + 1] if i + 1 < len(texts) else None, opening, item)
        item += word.text == ","


def _sentence(place: _Place) -> str:
    return f"“{place.opening} …”"


def _plain(place: _Place) -> Iterator[Feature]:
    text, previous = place.word.text, place.previous
    yield Feature("word", text)
    yield Feature("sentence", place.opening)
    yield Feature("item", str(place.item))
    yield Feature("word in sentence", f"“{text}” of {_sentence(place)}")
    if previous is not None:
        yield Feature("after", previous)
        yield Feature("phrase", f"{previous} {text}")


def _meant(place: _Place) -> Iterator[Feature]:
    """What a word of the scenes' language stands for, and what it stands with."""
    text = place.word.text
    own, before = _CLASSES.get(text), _CLASSES.get(place.previous or "")
    if before is not None:
        yield Feature("after class", before)
        yield Feature("phrase of class", f"{before}, then “{text}”")
    if own is None:
        return
    yield Feature("word class", own)
    yield Feature("phrase of word", f"{own} after “{place.previous}”")
    yield Feature("class in sentence", f"{own} of {_sentence(place)}")
    yield Feature("class of item", f"{own} in entry {place.item} of {_sentence(place)}")
    if text in COLOURS:
        yield Feature("colour anywhere", text)
    if text in _CATEGORY_OF:
        yield Feature("category anywhere", _CATEGORY_OF[text])
    if own == "places":
        yield Feature("place anywhere", text)
        yield Feature("spoken row", text[0])
        yield Feature("spoken column", text[1])
