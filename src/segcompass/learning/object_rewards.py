"""What an answer that names objects earns: for its form, its boxes and points, and no repetition.

Source: Seg-Zero and VisionReasoner. The scores of one answer are in [0, 1] here and their weights
are the published points, 7 in all; the reward is the weighted mean. No mask is looked at.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field
from scipy.optimize import linear_sum_assignment

from segcompass.reasoning.object_answers import (
    BOX_KEYS,
    POINT_KEYS,
    ObjectsError,
    TextObject,
    read_items,
    read_numbers,
    read_object,
)
from segcompass.reasoning.prompts import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    split_text,
)

CANVAS = 840  # px; the side that distances are given for
_CONCLUSION = re.compile(f"{ANSWER_OPEN}(.*?){ANSWER_CLOSE}", re.DOTALL)


class ObjectRewardConfig(BaseModel, frozen=True, extra="forbid"):
    """Weights of the scores, and from where on a box or a point is right."""

    think: float = Field(1.0, ge=0, description="weight of a thought and an answer, nothing else")
    answer: float = Field(2.0, ge=0, description="weight of complete boxes and points")
    accuracy: float = Field(3.0, ge=0, description="weight of right boxes and points")
    repetition: float = Field(1.0, ge=0, description="weight of not repeating sentences")
    iou: float = Field(0.5, ge=0, le=1, description="a right box has a larger IoU")
    box_px: float = Field(
        10.0, gt=0, description="... and a smaller mean distance of its edges; px of an 840 canvas"
    )
    point_px: float = Field(
        30.0, gt=0, description="a right point is nearer, and in its box; px of an 840 canvas"
    )


class ObjectScores(NamedTuple):
    """Scores of one answer, each in [0, 1]."""

    think: float
    answer: float
    accuracy: float
    repetition: float

    def reward(self, config: ObjectRewardConfig) -> float:
        """Their weighted mean."""
        weights = (config.think, config.answer, config.accuracy, config.repetition)
        total = sum(w * score for w, score in zip(weights, self, strict=True))
        return total / (sum(weights) or 1.0)


def object_scores(
    text: str, wanted: Sequence[TextObject], side: int, config: ObjectRewardConfig
) -> ObjectScores:
    """Score one answer.

    Args:
        text: All of it, without end-of-text.
        wanted: The target objects, with a point each, in px of the canvas.
        side: Of the canvas, in px; limits of distances are scaled to it.
        config: Limits.
    """
    parts = split_text(text)
    found = [parts[1]] if parts else _CONCLUSION.findall(text)
    items: list[dict[str, Any]] | None = None
    if len(found) == 1:
        try:
            items = read_items(found[0])
        except ObjectsError:
            items = None
    return ObjectScores(
        think=float(parts is not None and bool(parts[0])),
        answer=0.0 if items is None else _completeness(items),
        accuracy=0.0 if items is None else _accuracy(items, wanted, side / CANVAS, config),
        repetition=_freshness(parts[0] if parts else text.partition(ANSWER_OPEN)[0]),
    )


def _completeness(items: list[dict[str, Any]]) -> float:
    """Share of the boxes and points that are there and well-formed; 1 for no object at all."""
    if not items:
        return 1.0
    complete = [_any(item, BOX_KEYS, 4) + _any(item, POINT_KEYS, 2) for item in items]
    return sum(complete) / (2 * len(items))


def _any(item: dict[str, Any], keys: Sequence[str], count: int) -> bool:
    """Whether one of the keys holds ``count`` numbers."""
    for key in keys:
        try:
            read_numbers(item.get(key), count)
        except ObjectsError:
            continue
        return True
    return False


def _accuracy(
    items: list[dict[str, Any]],
    wanted: Sequence[TextObject],
    scale: float,
    config: ObjectRewardConfig,
) -> float:
    """Points of the best pairs, out of 3 for each of the found or wanted objects."""
    if not items or not wanted:
        return float(len(items) == len(wanted))
    points = np.zeros((len(items), len(wanted)))
    for row, item in enumerate(items):
        try:
            found = read_object(item)
        except ObjectsError:
            continue  # it counts as one that is wrong
        points[row] = [_pair(found, target, scale, config) for target in wanted]
    rows, columns = linear_sum_assignment(points, maximize=True)
    return float(points[rows, columns].sum() / (3 * max(points.shape)))


def _pair(found: TextObject, target: TextObject, scale: float, config: ObjectRewardConfig) -> int:
    """One for the box's IoU, one for its edges, one for the point."""
    box, truth = np.array(found.box), np.array(target.box)
    right = int(box_iou(box, truth) > config.iou)
    right += int(np.abs(box - truth).mean() < config.box_px * scale)
    if not found.points or not target.points:
        return right
    point = np.array(found.points[0])
    near = np.linalg.norm(point - target.points[0]) < config.point_px * scale
    inside = (box[:2] <= point).all() and (point <= box[2:]).all()
    return right + int(near and inside)


def box_iou(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> float:
    """IoU of two boxes x0 y0 x1 y1; 0 where both are empty."""
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    overlap = float(sides.clip(0).prod())
    areas = sum(float((b[2:] - b[:2]).prod()) for b in (first, second))
    return overlap / (areas - overlap) if areas > overlap else 0.0


def _freshness(thought: str) -> float:
    """1 unless two or more sentences say what was said before."""
    parts = re.split(rf"\.|{THINK_OPEN}|{THINK_CLOSE}", thought)
    sentences = Counter(part.strip() for part in parts if part.strip())
    return float(sentences.total() - len(sentences) < 2)
