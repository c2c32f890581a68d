"""Does the mask follow the chain of thought? Agreement of the two, and what corrupted text does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from jaxtyping import Float

from segcompass.evaluation.scoring import score_pair
from segcompass.explain.intervals import bootstrap
from segcompass.explain.intervene import answer_mask, overlap
from segcompass.explain.retell import corruptions, points_at, retell
from segcompass.explain.thoughts import answer_f1
from segcompass.io import masks
from segcompass.pipeline import SegCompass
from segcompass.types import Prediction, Sample, given

FOUND = 0.5  # IoU from which a mask counts as right


@dataclass(frozen=True)
class _Retold:
    """One answer, thought differently."""

    image_id: int
    corruption: str
    heatmap_r: float  # Pearson, with the heatmap as it was; NaN where one is flat
    agreement: float  # IoU with the answer as it was
    iou: float  # with the target
    points_at_text: float  # 1, 0; NaN where the text says nothing clear


class ThoughtConsistency:
    """Takes in answers one by one and retells each of them.

    Args:
        model: the model that answered; its policy reads every corrupted thought once.
        seed: of the corruptions.
    """

    def __init__(self, model: SegCompass, seed: int = 0) -> None:
        self.model, self.rng = model, Random(seed)
        self._retold: list[_Retold] = []
        self._right: list[tuple[bool, bool]] = []  # text, mask
        self._before: tuple[int, str] | None = None  # picture and thought of another answer

    def add(self, sample: Sample, prediction: Prediction) -> None:
        """Take in one answer; malformed ones say nothing and are left out."""
        if not prediction.status.well_formed:
            return
        before, self._before = self._before, (sample.image_id, prediction.reasoning)
        if sample.objects:
            right = answer_f1(sample, prediction.reasoning) == 1
            self._right.append((right, _iou(sample, prediction) >= FOUND))
        told = corruptions(sample, prediction, self.rng)
        if before is not None and before[0] != sample.image_id:
            told["stranger"] = before[1]
        for name, thought in told.items():
            after = retell(self.model, prediction, thought)
            points = points_at(after, sample.objects)
            self._retold.append(
                _Retold(
                    image_id=sample.image_id,
                    corruption=name,
                    heatmap_r=_correlation(_heat(prediction), _heat(after)),
                    agreement=overlap(answer_mask(prediction), answer_mask(after)),
                    iou=_iou(sample, after),
                    points_at_text=np.nan if points is None else float(points),
                )
            )

    def result(self, seed: int = 0) -> dict[str, Any]:
        """Figures ready for JSON; ``rows`` has one row for every corruption."""
        rights = np.array(self._right, dtype=bool).reshape(-1, 2)
        names = dict.fromkeys(row.corruption for row in self._retold)
        return {
            "text_and_mask": {
                "samples": len(rights),
                "both_right": int(rights.all(1).sum()),
                "text_alone_right": int((rights[:, 0] & ~rights[:, 1]).sum()),
                "mask_alone_right": int((~rights[:, 0] & rights[:, 1]).sum()),
                "neither": int((~rights).all(1).sum()),
            },
            "rows": [
                _row(name, [row for row in self._retold if row.corruption == name], seed)
                for name in names
            ],
        }


def _row(name: str, rows: Sequence[_Retold], seed: int) -> dict[str, Any]:
    """Means and intervals of one corruption; each measure over the answers that have it."""
    measures = ("heatmap_r", "agreement", "iou", "points_at_text")
    values = np.array([[getattr(row, measure) for measure in measures] for row in rows])
    has = np.isfinite(values)
    columns = np.concatenate([np.where(has, values, 0), has], axis=1)
    mean = _means(columns.sum(0, keepdims=True))[0]
    low, high = bootstrap(columns, _means, [row.image_id for row in rows], seed=seed)
    found: dict[str, Any] = {"corruption": name, "samples": len(rows)}
    for i, measure in enumerate(measures):
        found[measure] = _plain(mean[i])
        found[f"{measure}_low"], found[f"{measure}_high"] = _plain(low[i]), _plain(high[i])
    return found


def _means(sums: Float[np.ndarray, "r c"]) -> Float[np.ndarray, "r half"]:
    half = sums.shape[1] // 2
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[:, :half] / sums[:, half:])


def _heat(prediction: Prediction) -> Float[np.ndarray, "h w"]:
    """Where the model looks: the slots' heatmaps, each as strong as it is confident."""
    heat = 1 / (1 + np.exp(-given(prediction.heatmap_logits, "heatmaps")))
    return np.asarray((prediction.slot_scores[:, None, None] * heat).max(0))


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


def _iou(sample: Sample, prediction: Prediction) -> float:
    target = masks.union(sample.targets, sample.image_hw)
    ignore = None if sample.ignore is None else masks.decode(sample.ignore)
    return score_pair(answer_mask(prediction), target, ignore, status=prediction.status).iou


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
