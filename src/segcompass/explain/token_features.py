"""What is known about each token without asking the model: the vocabulary of concept labels.

A feature is a value of a family, such as ("colour", "red"). The values of one family never share a
token, so the tokens of several values are counted by adding. Words, places and targets are known
for every data set, looks for scenes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from segcompass.data.samples import ImageRecord
from segcompass.data.scenes.catalog import CATEGORIES, COLOURS, SIZES, TEXTURES, cell_of
from segcompass.explain.token_regions import INSTANCE, on_instance, shares
from segcompass.explain.words import words
from segcompass.io import masks
from segcompass.types import Prediction, Sample, TokenKind

# Each family and how its values are read on a card; earlier ones win ties.
FAMILIES: dict[str, str] = {
    "category": "{} patches",
    "colour": "{} patches",
    "look": "{} patches",
    "size": "patches of {} things",
    "texture": "patches of {} things",
    "thing": "patches of {}",
    "row": "patches in row {}",
    "column": "patches in column {}",
    "cell": "patches at {}",
    "target": "patches of {}",
    "word": "the word {}",
    "piece": "the piece {}",
    "colour anywhere": "{}, in picture and words",
    "category anywhere": "{}, in picture and words",
    "word class": "words for {}",
    "next": "before the word {}",
    "next class": "before words for {}",
    "phrase": "the end of {}",
    "after": "after the word {}",
    "kind": "{} tokens",
}
QUOTED = ("word", "piece", "next", "phrase", "after")
VALUES = 10_000  # of each family; those met later are not counted
VOCABULARY = VALUES * len(FAMILIES)
_KINDS = {
    TokenKind.TEMPLATE: "template",
    TokenKind.IMAGE: "picture",
    TokenKind.INSTRUCTION: "question",
    TokenKind.THOUGHT: "thought",
}
_CATEGORY_OF = {form: c.name for c in CATEGORIES.values() for form in (c.name, c.plural)}
_CLASSES: dict[str, str] = {
    **dict.fromkeys(COLOURS, "colours"),
    **dict.fromkeys(_CATEGORY_OF, "categories"),
    **dict.fromkeys(SIZES, "sizes"),
    **dict.fromkeys(TEXTURES, "textures"),
    **{f"{row}{column}": "places" for row in "abcdefgh" for column in range(1, 9)},
}


class Feature(NamedTuple):
    """A value of a family."""

    family: str
    value: str


class Vocabulary:
    """Numbers features as they are met; a family's numbers begin at its place times VALUES."""

    def __init__(self) -> None:
        self._families: dict[str, dict[str, int]] = {family: {} for family in FAMILIES}
        self._starts = {family: place * VALUES for place, family in enumerate(FAMILIES)}

    def feature(self, number: int) -> Feature:
        """The feature of a number."""
        family = [*FAMILIES][number // VALUES]
        return Feature(family, self.family(family)[0][number % VALUES])

    def family(self, name: str) -> tuple[list[str], slice]:
        """The values of a family, and the numbers of its features."""
        known, start = self._families[name], self._starts[name]
        return [*known], slice(start, start + len(known))

    def table(self, found: Iterator[tuple[int, Feature]], n_tokens: int) -> csr_array:
        """Tokens and their features as a binary (n_tokens, VOCABULARY) matrix."""
        rows, columns = [], []
        for token, feature in found:
            known = self._families[feature.family]
            if len(known) < VALUES or feature.value in known:
                rows.append(token)
                place = known.setdefault(feature.value, len(known))
                columns.append(self._starts[feature.family] + place)
        shape = (n_tokens, VOCABULARY)
        return csr_array((np.ones(len(rows), dtype=np.int32), (rows, columns)), shape=shape)


def token_features(
    sample: Sample, prediction: Prediction, scenes: Mapping[int, ImageRecord]
) -> Iterator[tuple[int, Feature]]:
    """Every (token, feature) of an answer.

    Args:
        sample: what was asked.
        prediction: the answer, with its tokens.
        scenes: pictures of which everything is known, by image id; empty for real data sets.
    """
    for token, kind in enumerate(prediction.token_kinds.tolist()):
        if kind in _KINDS:
            yield token, Feature("kind", _KINDS[TokenKind(kind)])
    scene = scenes.get(sample.image_id)
    yield from _of_words(prediction, looks=scene is not None)
    image = np.flatnonzero(prediction.token_kinds == TokenKind.IMAGE).tolist()
    yield from _of_places(sample, prediction, image)
    if scene is not None:
        yield from _of_things(scene, prediction, image)


def _of_words(prediction: Prediction, *, looks: bool) -> Iterator[tuple[int, Feature]]:
    spoken = words(prediction)
    before = [None, *(word.text for word in spoken[:-1])]
    after = [*(word.text for word in spoken[1:]), None]
    for word, previous, following in zip(spoken, before, after, strict=True):
        for token in word.tokens:
            yield token, Feature("word", word.text)
            if len(word.tokens) > 1:
                yield token, Feature("piece", prediction.tokens[token].strip())
            if previous is not None:
                yield token, Feature("after", previous)
                yield token, Feature("phrase", f"{previous} {word.text}")
            if looks:
                yield from ((token, feature) for feature in _meanings(word.text))
        if following is not None:
            yield word.tokens[-1], Feature("next", following)
            if looks and following in _CLASSES:
                yield word.tokens[-1], Feature("next class", _CLASSES[following])


def _meanings(word: str) -> Iterator[Feature]:
    """What a word of the scenes' language stands for."""
    if word in _CLASSES:
        yield Feature("word class", _CLASSES[word])
    if word in COLOURS:
        yield Feature("colour anywhere", word)
    if word in _CATEGORY_OF:
        yield Feature("category anywhere", _CATEGORY_OF[word])


def _of_places(
    sample: Sample, prediction: Prediction, image: list[int]
) -> Iterator[tuple[int, Feature]]:
    height, width = sample.image_hw
    target = on_instance(prediction.token_boxes, masks.union(sample.targets, sample.image_hw))
    for token, (x0, y0, x1, y1), wanted in zip(image, prediction.token_boxes, target, strict=True):
        cell = cell_of((x0 + x1) / 2 / width, (y0 + y1) / 2 / height)
        yield token, Feature("row", cell[0])
        yield token, Feature("column", cell[1])
        yield token, Feature("cell", cell)
        yield token, Feature("target", "the target" if wanted else "the rest")


def _of_things(
    scene: ImageRecord, prediction: Prediction, image: list[int]
) -> Iterator[tuple[int, Feature]]:
    parts = shares(prediction.token_boxes, np.stack([masks.decode(rle) for rle in scene.masks]))
    for token, covered in zip(image, parts.T, strict=True):
        best = int(covered.argmax())
        if covered[best] < INSTANCE:
            yield token, Feature("thing", "the background")
            continue
        thing = scene.objects[best]
        yield token, Feature("thing", "things")
        yield token, Feature("look", f"{thing.colour} {thing.category}")
        for family in ("category", "colour", "size", "texture"):
            yield token, Feature(family, getattr(thing, family))
        yield token, Feature("colour anywhere", thing.colour)
        yield token, Feature("category anywhere", thing.category)
