"""How good a chain of thought is, where the data set knows what it should say (scenes)."""

from __future__ import annotations

import re
from collections import Counter

from segcompass.data.scenes.catalog import CATEGORIES, COLOURS
from segcompass.data.scenes.grammar import resolve
from segcompass.types import Sample

_NAME = re.compile(rf"\b(?:{'|'.join(COLOURS)}) (?:{'|'.join(CATEGORIES)}) [a-h][1-8]\b")


def thought_f1(thought: str, oracle: str) -> float:
    """Agreement of all names in a thought ("red mug b4") with those of the oracle's thought.

    F1 of the two multisets of names: listing, every step and the conclusion count alike. 1 where
    neither names anything.
    """
    said, wanted = Counter(_NAME.findall(thought)), Counter(_NAME.findall(oracle))
    return _f1((said & wanted).total(), said.total(), wanted.total())


def answer_f1(sample: Sample, thought: str) -> float:
    """Agreement of the things that the closing sentence names with the targets, as F1.

    0 where there is no closing sentence that can be resolved; 1 where rightly nothing is named.
    """
    named = resolve(thought, sample.objects)
    if named is None:
        return 0.0
    found = {sample.objects[i].ann_id for i in named}
    return _f1(len(found & set(sample.target_ids)), len(found), len(set(sample.target_ids)))


def _f1(both: int, found: int, wanted: int) -> float:
    return 2 * both / (found + wanted) if found + wanted else 1.0
