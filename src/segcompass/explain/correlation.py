"""What goes with good masks: SAE error, heatmaps (Fig. 8), chains of thought (CoPRS)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from segcompass.evaluation.scoring import score_pair
from segcompass.explain.intervals import Line, bootstrap, fit_line
from segcompass.explain.thoughts import answer_f1, thought_f1
from segcompass.io import masks
from segcompass.learning.losses import dice_loss
from segcompass.learning.matching import match
from segcompass.learning.segmentation import wanted_maps
from segcompass.types import Prediction, Sample, Status

HOT = 0.5  # a heatmap counts as a mask where it is above this
RANGES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the conclusion's F1; the last range is [0.75, 1]
SHOWS = ("concepts", "heatmaps")  # what the answers of some interfaces lack


@dataclass(frozen=True)
class Quality:
    """How well each stage did on one sample; None where that cannot be said."""

    sample_id: str
    image_id: int
    status: str
    targets: int  # 0 where nothing matches
    mask_iou: float  # of the unions, as evaluation counts it
    heatmap_iou: float | None  # of the accepted slots; None where no slot is accepted
    dice_loss: float | None  # mean over slots matched by heatmap, as in training
    sae_error: float | None  # ‖z - ẑ‖² / D, mean over the tokens that the SAE reads
    thought_f1: float | None
    answer_f1: float | None

    @property
    def counts(self) -> bool:
        """Whether figures hold it: a well-formed answer to a sample with a target."""
        return self.targets > 0 and Status(self.status).well_formed


def shows(prediction: Prediction) -> set[str]:
    """Which of :data:`SHOWS` the answer has."""
    parts = (prediction.codes, prediction.slot_heatmaps)
    return {name for name, part in zip(SHOWS, parts, strict=True) if part is not None}


def quality(sample: Sample, prediction: Prediction) -> Quality:
    """Judge one answer stage by stage."""
    answered = prediction.status.well_formed
    errors = prediction.sae_errors
    return Quality(
        sample_id=sample.sample_id,
        image_id=sample.image_id,
        status=prediction.status.value,
        targets=len(sample.targets),
        mask_iou=_iou(sample, prediction, np.asarray(prediction.masks.any(axis=0))),
        heatmap_iou=_heatmap_iou(sample, prediction),
        dice_loss=_dice(sample, prediction) if answered and sample.targets else None,
        sae_error=None if errors is None else float(np.nanmean(errors, dtype=np.float64)),
        thought_f1=None
        if sample.thought is None
        else thought_f1(_said(prediction), sample.thought),
        answer_f1=answer_f1(sample, _said(prediction)) if sample.objects else None,
    )


def _said(prediction: Prediction) -> str:
    return prediction.reasoning if prediction.status.well_formed else ""


def _iou(sample: Sample, prediction: Prediction, found: np.ndarray) -> float:
    wanted = masks.union(sample.targets, sample.image_hw)
    ignore = None if sample.ignore is None else masks.decode(sample.ignore)
    return score_pair(found, wanted, ignore, status=prediction.status).iou


def _heatmap_iou(sample: Sample, prediction: Prediction) -> float | None:
    if prediction.heatmaps is None or not prediction.accepted.any():
        return None
    # Saved predictions keep heatmaps in half precision; judging live ones alike gives one result.
    hot = (prediction.heatmaps.astype(np.float16) > HOT).any(axis=0)
    return _iou(sample, prediction, np.asarray(hot))


def _dice(sample: Sample, prediction: Prediction) -> float | None:
    """Eq. 6's dice loss of the slots that training would have matched by their heatmaps."""
    if prediction.heatmap_logits is None:
        return None
    logits = torch.from_numpy(prediction.low_res_logits)
    heat = torch.from_numpy(prediction.heatmap_logits)
    side, together = 4 * logits.shape[-1], len(heat) == 1  # SAM: masks at a quarter of the frame
    coarse = wanted_maps(sample, side, heat.shape[-1], together)
    confidence = torch.logit(torch.from_numpy(prediction.slot_scores), eps=1e-6)
    matches = match(heat[None], confidence[None], [coarse])
    fine = wanted_maps(sample, side, logits.shape[-1], together)
    return float(dice_loss(logits[matches.slots], fine[matches.indices]).mean())


@dataclass(frozen=True)
class Correlation:
    """Two measured quantities of some samples, and the line through them."""

    name: str
    x_label: str
    y_label: str
    x: np.ndarray
    y: np.ndarray
    line: Line | None

    def rows(self) -> list[dict[str, float]]:
        """The points."""
        return [
            {self.x_label: x, self.y_label: y}
            for x, y in zip(self.x.tolist(), self.y.tolist(), strict=True)
        ]

    def summary(self) -> dict[str, Any]:
        """n, r, p, intervals; n alone where no line can be fitted."""
        return {"n": len(self.x)} if self.line is None else self.line.summary()


# name, axis labels, and the two fields
PAIRS: tuple[tuple[str, str, str, str, str], ...] = (
    ("sae_error", "SAE reconstruction error (MSE)", "dice loss", "sae_error", "dice_loss"),
    ("heatmap", "heatmap IoU", "mask IoU", "heatmap_iou", "mask_iou"),
    ("thought_heatmap", "chain-of-thought F1", "heatmap IoU", "thought_f1", "heatmap_iou"),
    ("thought_mask", "chain-of-thought F1", "mask IoU", "thought_f1", "mask_iou"),
    ("answer_heatmap", "F1 of the concluded things", "heatmap IoU", "answer_f1", "heatmap_iou"),
    ("answer_mask", "F1 of the concluded things", "mask IoU", "answer_f1", "mask_iou"),
)
_NEEDS = {"sae_error": "concepts", "dice_loss": "heatmaps", "heatmap_iou": "heatmaps"}  # by field


def needs_of_pairs() -> dict[str, list[str]]:
    """Of every pair, which of :data:`SHOWS` it is made of."""
    return {
        name: [_NEEDS[field] for field in fields if field in _NEEDS]
        for name, _, _, *fields in PAIRS
    }


def correlations(rows: Sequence[Quality], shown: Collection[str] = SHOWS) -> list[Correlation]:
    """The pairs of :data:`PAIRS`, each over the samples with a target that have both.

    Pairs that need what the answers do not show are left out.
    """
    found, needs = [], needs_of_pairs()
    for name, x_label, y_label, x_field, y_field in PAIRS:
        if not {*needs[name]} <= {*shown}:
            continue
        pairs = [(getattr(row, x_field), getattr(row, y_field)) for row in rows if row.counts]
        points = np.array([p for p in pairs if None not in p], dtype=np.float64).reshape(-1, 2)
        line = fit_line(points[:, 0], points[:, 1])
        found.append(Correlation(name, x_label, y_label, points[:, 0], points[:, 1], line))
    return found


def by_answer(rows: Sequence[Quality], shown: Collection[str] = SHOWS) -> list[dict[str, Any]]:
    """Samples, mean heatmap IoU and mean mask IoU by how well the thought concludes.

    Source: CoPRS's table of consistency ranges, with :func:`answer_f1` as the score. A sample
    without an accepted slot has heatmap IoU 0 here; answers that show no heatmaps have none.
    """
    measures = [m for m in ("heatmap_iou", "mask_iou") if _NEEDS.get(m) in {None, *shown}]
    judged = [(r.answer_f1, r) for r in rows if r.answer_f1 is not None and r.counts]
    found: list[dict[str, Any]] = []
    for low, high in pairwise(RANGES):
        last = high == RANGES[-1]
        inside = [row for score, row in judged if low <= score and (score < high or last)]
        if not inside:
            continue
        columns = np.array([[*(getattr(r, m) or 0.0 for m in measures), 1.0] for r in inside])
        mean = _means(columns.sum(axis=0, keepdims=True))[0]
        limits = bootstrap(columns, _means, [r.image_id for r in inside]).T
        found.append({"low": low, "high": high, "samples": len(inside)})
        for name, value, interval in zip(measures, mean, limits, strict=True):
            found[-1] |= {name: float(value), f"{name}_interval": interval.tolist()}
    return found


def _means(sums: np.ndarray) -> np.ndarray:
    return np.asarray(sums[:, :-1] / sums[:, -1:])


def right_and_wrong(rows: Sequence[Quality]) -> dict[str, Any] | None:
    """Mean mask IoU where the thought concludes rightly and where it does not; None if unjudged."""
    judged = [row for row in rows if row.answer_f1 is not None]
    right = np.array([row.answer_f1 == 1 for row in judged], dtype=np.float64)
    if not right.any() or right.all():
        return None
    iou = np.array([row.mask_iou for row in judged])
    columns = np.column_stack([iou * right, right, iou * (1 - right), 1 - right])
    mean = _contrast(columns.sum(axis=0, keepdims=True))[0]
    limits = bootstrap(columns, _contrast, [row.image_id for row in judged]).T
    names = ("right", "wrong", "difference")
    return {"n_right": int(right.sum()), "n_wrong": int((1 - right).sum())} | {
        name: {"mask_iou": float(m), "interval": interval.tolist()}
        for name, m, interval in zip(names, mean, limits, strict=True)
    }


def _contrast(sums: np.ndarray) -> np.ndarray:
    """Mean IoU of the right, of the wrong, and their difference."""
    right, wrong = sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]
    return np.stack([right, wrong, right - wrong], axis=1)
