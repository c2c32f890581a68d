"""The static report: one HTML file per run that explains every prediction, with no server.

The page's behaviour is in ``templates/report.js``; what keeps it self-contained in ``pages.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from segcompass.apps import report_layers as layers
from segcompass.apps.pages import render
from segcompass.apps.report_words import Words, align_words
from segcompass.io.outputs import (
    ConceptWeight,
    active_concepts,
    code_matrix,
    slot_colour,
    slot_concepts,
    token_heat,
    word_activations,
)
from segcompass.types import Prediction, Status, TokenKind

SLOT_CONCEPTS = 10  # concepts listed for a slot
WORD_CONCEPTS = 3  # concepts kept for a word
LEVELS = 99  # activations travel as whole numbers 1..99, relative to the largest

_BADGES = {
    Status.NO_TARGET: "nothing matches",
    Status.MALFORMED: "malformed answer",
    Status.TRUNCATED: "truncated answer",
}
_NOTES = {
    Status.NO_TARGET: "The answer is well-formed, and no slot reached the threshold: the model "
    "says that nothing in the picture matches.",
    Status.MALFORMED: "The answer does not have the form that was asked for, so no mask was read "
    "from it. The whole text stands here as it was generated.",
    Status.TRUNCATED: "The answer was cut off before it was complete, so no mask was read from it.",
}


def write_report(
    predictions: Sequence[Prediction], path: str | Path, *, title: str = "SegCompass"
) -> Path:
    """Write one self-contained HTML page about all ``predictions``.

    Args:
        predictions: in the order in which they are to appear.
        path: the file to write; its folder is made if it is not there.
        title: heading of the page.

    Returns:
        The path of the page.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render_report(predictions, title=title), encoding="utf-8")
    return target


def render_report(predictions: Sequence[Prediction], *, title: str = "SegCompass") -> str:
    """The page of ``write_report`` as text."""
    return render(
        "report.html.j2",
        styles=["report.css"],
        scripts=["report.js"],
        title=title,
        cards=[card(i, prediction) for i, prediction in enumerate(predictions)],
        summary=_summary(predictions),
    )


def _summary(predictions: Sequence[Prediction]) -> list[str]:
    """Short counts for the head of the page."""
    counts = {status: sum(p.status is status for p in predictions) for status in Status}
    words = {Status.OK: "with masks"} | _BADGES
    number = len(predictions)
    return [f"{number} {'picture' if number == 1 else 'pictures'}"] + [
        f"{count} {words[status]}" for status, count in counts.items() if count and number > 1
    ]


def card(index: int, prediction: Prediction, also: Iterable[int] = ()) -> dict[str, Any]:
    """Everything that ``card.html.j2`` says about one prediction.

    Args:
        index: tells the cards of one page apart.
        prediction: what to show.
        also: concepts to follow beside those that the card lists itself.
    """
    height, width = prediction.image_rgb.shape[:2]
    readings = word_activations(prediction, WORD_CONCEPTS)
    concepts, overall = slot_concepts(prediction, SLOT_CONCEPTS), _overall(prediction)
    words = Words()
    instruction = align_words(
        prediction.instruction, [r for r in readings if r.kind == TokenKind.INSTRUCTION], words
    )
    thought = align_words(
        prediction.reasoning, [r for r in readings if r.kind == TokenKind.THOUGHT], words
    )
    shown = {c.concept for listed in (*concepts, overall) for c in listed}
    shown |= {c.concept for word in words.concepts for c in word} | set(also)
    return {
        "id": f"p{index}",
        "name": PurePath(prediction.source.replace("\\", "/")).name if prediction.source else None,
        "width": width,
        "height": height,
        "prediction": prediction,
        "badge": _BADGES.get(prediction.status) or _count(int(prediction.accepted.sum()), "mask"),
        "note": _NOTES.get(prediction.status),
        "instruction": instruction,
        "thought": thought,
        "slots": _slots(prediction, concepts),
        "overall": overall,
        "active": active_concepts(prediction),
        "picture": layers.picture(prediction),
        "thumbnail": layers.thumbnail(prediction),
        "seconds": sum(prediction.timings.values()),
        "data": {
            "width": width,
            "height": height,
            "boxes": np.rint(prediction.token_boxes).astype(int).tolist(),
            "heat": [_levels(row) for row in token_heat(prediction)],
            "words": [[[c.concept, round(c.weight, 2)] for c in word] for word in words.concepts],
            "concepts": _firing(prediction, sorted(shown), words),
        },
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _slots(
    prediction: Prediction, concepts: Sequence[tuple[ConceptWeight, ...]]
) -> list[dict[str, Any]]:
    return [
        {
            "index": k,
            "accepted": bool(prediction.accepted[k]),
            "score": float(prediction.slot_scores[k]),
            "colour": "rgb({}, {}, {})".format(*slot_colour(k)),
            "share": float(prediction.slot_masks[k].mean()),
            "mask": layers.mask_layer(prediction, k) if prediction.accepted[k] else None,
            "heat": layers.heat_layer(prediction, k),
            "concepts": concepts[k],
        }
        for k in range(len(prediction.slot_scores))
    ]


def _overall(prediction: Prediction) -> list[ConceptWeight]:
    """The concepts of the accepted slots together (of all slots where none is accepted)."""
    attention = prediction.slot_attention
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
