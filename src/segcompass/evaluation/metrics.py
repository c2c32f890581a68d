"""Score masks against targets, and add the scores up: gIoU, cIoU, N-acc, T-acc, Pr@t.

Source: the gRefCOCO protocol. Prediction and target are unions of instances. Where nothing is to be
found, predicting nothing scores IoU 1 and adds nothing to the sums, predicting anything scores 0
and adds its area to the union. An answer that is not well-formed scores IoU 0, and is never a
correct "nothing matches".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from segcompass.types import Status

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
RESAMPLES = 1000
CONFIDENCE = 0.95
RESAMPLING_CELLS = 4_000_000  # resamples x samples held in memory at a time
INTERVALS = ("giou", "ciou", "giou_target", "n_acc", "t_acc")


@dataclass(frozen=True)
class PairScore:
    """How one answer about one (image, instruction) pair did."""

    sample_id: str
    intersection: int  # px
    union: int  # px
    iou: float  # in [0, 1]
    has_target: bool
    predicted_any: bool  # a well-formed answer with at least one pixel
    status: Status = Status.OK
    kind: str | None = None
    reasoning_correct: bool | None = None  # the thought names exactly the targets; None: unjudged

    @property
    def well_formed(self) -> bool:
        """Whether the answer had the form that was asked for."""
        return self.status in (Status.OK, Status.NO_TARGET)

    @property
    def presence_correct(self) -> bool:
        """Whether the answer was right about there being something or nothing."""
        return self.well_formed and self.predicted_any == self.has_target


def score_pair(
    prediction: Bool[np.ndarray, "H W"],
    target: Bool[np.ndarray, "H W"],
    ignore: Bool[np.ndarray, "H W"] | None = None,
    *,
    sample_id: str = "",
    status: Status = Status.OK,
    kind: str | None = None,
    reasoning_correct: bool | None = None,
) -> PairScore:
    """Score one prediction by the gRefCOCO rules, at the image's own size.

    Args:
        prediction: union of the accepted slots; not looked at unless the answer is well-formed.
        target: union of the target instances; empty when nothing matches.
        ignore: pixels left out of both (ReasonSeg).
        sample_id: carried along.
        status: how the answer ended.
        kind: question kind, for the breakdown.
        reasoning_correct: whether the thought names exactly the targets, where that can be judged.

    Returns:
        The score; an empty union counts as IoU 1 where the answer is well-formed.

    Raises:
        ValueError: the masks differ in shape.
    """
    for name, mask in (("target", target), ("ignore", ignore)):
        if mask is not None and mask.shape != prediction.shape:
            raise ValueError(f"{name} has shape {mask.shape}, the prediction {prediction.shape}")
    well_formed = status in (Status.OK, Status.NO_TARGET)
    predicted = prediction if well_formed else np.zeros_like(prediction)
    if ignore is not None:
        predicted, target = predicted & ~ignore, target & ~ignore
    intersection = int(np.count_nonzero(predicted & target))
    union = int(np.count_nonzero(predicted | target))
    iou = intersection / union if union else float(well_formed)
    return PairScore(
        sample_id=sample_id,
        intersection=intersection,
        union=union,
        iou=iou,
        has_target=bool(target.any()),
        predicted_any=bool(predicted.any()),
        status=status,
        kind=kind,
        reasoning_correct=reasoning_correct,
    )


class Metrics:
    """Collects scores and sums them up. The order of the samples changes nothing but rounding."""

    def __init__(self, scores: Iterable[PairScore] = ()) -> None:
        self.scores = list(scores)

    def add(self, score: PairScore) -> None:
        """Count one more sample."""
        self.scores.append(score)

    def result(self, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Any]:
        """All figures so far, ready for JSON; None where a figure is undefined.

        Args:
            seed: of the bootstrap.
            resamples: bootstrap resamples for the intervals; 0 leaves them out.

        Returns:
            samples, giou, ciou, giou_target (mean IoU over samples that have a target), n_acc,
            t_acc, format_valid, reasoning_target_accuracy, by_kind, pr@0.5 … pr@0.9 (over samples
            that have a target), and intervals: 95 % percentile bootstrap, [low, high] each.
        """
        ious = np.array([s.iou for s in self.scores])
        has_target = np.array([s.has_target for s in self.scores], dtype=bool)
        target_ious = ious[has_target]
        columns = self._columns()
        totals = _figures(columns.sum(axis=0, keepdims=True))
        return {
            "samples": len(self.scores),
            **{name: _plain(values[0]) for name, values in totals.items()},
            "format_valid": _mean([s.well_formed for s in self.scores]),
            "reasoning_target_accuracy": _mean(
                [s.reasoning_correct for s in self.scores if s.reasoning_correct is not None]
            ),
            "by_kind": self._by_kind(),
            **{f"pr@{t}": _mean(target_ious >= t) for t in PRECISION_AT},
            "intervals": _intervals(columns, seed, resamples),
        }

    def _by_kind(self) -> dict[str, float | None]:
        kinds = sorted({s.kind for s in self.scores if s.kind is not None})
        return {
            k: _mean([s.iou for s in self.scores if s.kind == k and s.has_target]) for k in kinds
        }

    def _columns(self) -> Float[np.ndarray, "n 8"]:
        """What is summed over samples, one row each; ``_figures`` divides the sums."""
        rows = [
            (
                1.0,
                s.iou,
                s.intersection,
                s.union,
                s.has_target,
                s.iou * s.has_target,
                s.presence_correct and not s.has_target,
                s.presence_correct and s.has_target,
            )
            for s in self.scores
        ]
        return np.array(rows, dtype=np.float64).reshape(-1, 8)


def _figures(sums: Float[np.ndarray, "r 8"]) -> dict[str, Float[np.ndarray, " r"]]:
    """The figures of r sets of sums; NaN where one divides by nothing."""
    n, iou, intersection, union, target, target_iou, right_nothing, right_something = sums.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "giou": iou / n,
            "ciou": intersection / union,
            "giou_target": target_iou / target,
            "n_acc": right_nothing / (n - target),
            "t_acc": right_something / target,
        }


def _intervals(
    columns: Float[np.ndarray, "n 8"], seed: int, resamples: int
) -> dict[str, list[float] | None]:
    """Percentile bootstrap; resamples in which a figure is undefined do not count for it."""
    n = len(columns)
    if n == 0 or resamples == 0:
        return dict.fromkeys(INTERVALS)
    rng = np.random.default_rng(seed)
    sums: list[np.ndarray] = []
    chunk = max(1, RESAMPLING_CELLS // n)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = rng.integers(0, n, size=(rows, n)) + np.arange(rows)[:, None] * n
        weights = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        sums.append(weights @ columns)
    figures = _figures(np.concatenate(sums))
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    found: dict[str, list[float] | None] = {}
    for name in INTERVALS:
        defined = figures[name][np.isfinite(figures[name])]
        found[name] = [float(q) for q in np.quantile(defined, tails)] if len(defined) else None
    return found


def _mean(values: Any) -> float | None:
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size else None


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
