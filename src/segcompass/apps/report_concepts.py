"""What a card of the report says about concepts, for answers that have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from segcompass.apps.report_words import Segment, Words, align_words
from segcompass.io.readings import (
    ConceptWeight,
    active_concepts,
    code_matrix,
    slot_concepts,
    token_heat,
    word_activations,
)
from segcompass.types import Prediction, TokenKind, given

SLOT_CONCEPTS = 10  # concepts listed for a slot
WORD_CONCEPTS = 3  # concepts kept for a word
LEVELS = 99  # activations travel as whole numbers 1..99, relative to the largest
NO_DATA: dict[str, Any] = {"boxes": [], "heat": [], "words": [], "concepts": {}}


class Concepts(NamedTuple):
    """Where concepts fire, in text, picture and slots."""

    instruction: list[Segment]
    thought: list[Segment]
    slots: list[tuple[ConceptWeight, ...]]  # of each slot, strongest first
    overall: list[ConceptWeight]  # of the slots that count together
    active: int
    data: dict[str, Any]  # for the page's script


def read_concepts(prediction: Prediction, also: Iterable[int] = ()) -> Concepts:
    """Everything about concepts that a card lists, marks or follows.

    Args:
        prediction: of an interface that has concepts.
        also: concepts to follow beside those that the card lists itself.
    """
    readings = word_activations(prediction, WORD_CONCEPTS)
    slots, overall = slot_concepts(prediction, SLOT_CONCEPTS), _overall(prediction)
    words = Words()
    instruction, thought = (
        align_words(text, [r for r in readings if r.kind == kind], words)
        for text, kind in (
            (prediction.instruction, TokenKind.INSTRUCTION),
            (prediction.reasoning, TokenKind.THOUGHT),
        )
    )
    shown = {c.concept for listed in (*slots, overall) for c in listed}
    shown |= {c.concept for word in words.concepts for c in word} | set(also)
    data = {
        "boxes": np.rint(prediction.token_boxes).astype(int).tolist(),
        "heat": [_levels(row) for row in token_heat(prediction)],
        "words": [[[c.concept, round(c.weight, 2)] for c in word] for word in words.concepts],
        "concepts": _firing(prediction, sorted(shown), words),
    }
    return Concepts(instruction, thought, slots, overall, active_concepts(prediction), data)


def _overall(prediction: Prediction) -> list[ConceptWeight]:
    """The concepts of the accepted slots together (of all slots where none is accepted)."""
    attention = given(prediction.slot_attention, "slot attention")
    if prediction.accepted.any():
        attention = attention[prediction.accepted]
    weights = code_matrix(prediction).T @ attention.sum(axis=0)
    best = np.argsort(-weights, kind="stable")[:SLOT_CONCEPTS]
    return [ConceptWeight(int(j), float(weights[j])) for j in best if weights[j] > 0]


def _firing(prediction: Prediction, concepts: list[int], words: Words) -> dict[str, Any]:
    """For every concept shown: its largest activation, and where in picture and words it fires."""
    columns = code_matrix(prediction)[:, concepts].tocsc()
    image = np.cumsum(prediction.token_kinds == TokenKind.IMAGE) - 1
    firing: dict[str, Any] = {}
    for position, concept in enumerate(concepts):
        span = slice(columns.indptr[position], columns.indptr[position + 1])
        rows, values = columns.indices[span], columns.data[span]
        scale = float(values.max(initial=0.0)) or 1.0
        on_image: dict[int, int] = {}
        on_words: dict[int, int] = {}
        for row, value in zip(rows.tolist(), values.tolist(), strict=True):
            level = round(LEVELS * value / scale)
            if prediction.token_kinds[row] == TokenKind.IMAGE:
                on_image[int(image[row])] = level
            elif row in words.of_token:
                word = words.of_token[row]
                on_words[word] = max(level, on_words.get(word, 0))
        firing[str(concept)] = [round(scale, 2), _pairs(on_image), _pairs(on_words)]
    return firing


def _pairs(levels: dict[int, int]) -> list[int]:
    """Flat [index, level, index, level, …] without zeros, in order of index."""
    return [
        number for index in sorted(levels) if levels[index] for number in (index, levels[index])
    ]


def _levels(values: np.ndarray) -> list[int]:
    """Values as whole numbers 0..LEVELS, relative to the largest."""
    largest = float(values.max(initial=0.0))
    if largest <= 0:
        return [0] * len(values)
    return [round(LEVELS * float(value) / largest) for value in values]
