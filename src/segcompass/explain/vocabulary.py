"""What a label can say: families of features, and their numbers.

A feature is a value of a family, such as ("colour", "red"). The values of one family never share a
token, so the tokens of several values are counted by adding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

# Each family and how its values are read on a card; earlier ones win ties.
FAMILIES: dict[str, str] = {
    "category": "{} patches",
    "colour": "{} patches",
    "look": "{} patches",
    "size": "patches of {} things",
    "texture": "patches of {} things",
    "build": "patches of {} things",
    "thing": "patches of {}",
    "part": "patches at the {} of things",
    "target": "patches of {}",
    "beside": "patches of things {}",
    "above": "patches of things {}",
    "likeness": "patches of things {}",
    "nearness": "patches of things {}",
    "row": "patches in row {}",
    "column": "patches in column {}",
    "cell": "patches at {}",
    "filled": "patches of {}",
    "colour in row": "patches of {}",
    "colour in column": "patches of {}",
    "word": "the word {}",
    "piece": "the piece {}",
    "mark": "the mark {}",
    "colour anywhere": "{}, in picture and words",
    "category anywhere": "{}, in picture and words",
    "place anywhere": "{}, in picture and words",
    "word class": "words for {}",
    "spoken row": "words for places in row {}",
    "spoken column": "words for places in column {}",
    "next": "before the word {}",
    "next class": "before words for {}",
    "phrase": "the end of {}",
    "phrase of word": "words for {}",
    "phrase of class": "a word for {}",
    "after": "after the word {}",
    "after class": "after words for {}",
    "sentence": "words of sentences that begin with {}",
    "word in sentence": "the word {}",
    "piece in sentence": "the piece {}",
    "item": "words of entry {} of a list",
    "class in sentence": "words for {}",
    "class of item": "words for {}",
    "kind": "{} tokens",
}
QUOTED = ("word", "piece", "mark", "next", "phrase", "after", "sentence")
VALUES = 10_000  # of each family; those met later are not counted
VOCABULARY = VALUES * len(FAMILIES)


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
