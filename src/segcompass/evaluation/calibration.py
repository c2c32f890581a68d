"""Choose the confidence threshold on a train or val run, and say how far to trust confidences.

One threshold makes both decisions: which slots are the answer, and, where none is above it, that
nothing matches. It is never chosen on a test split.

Source: expected calibration error and reliability diagram as in Guo et al., 2017
(https://arxiv.org/abs/1706.04599), ten bins of equal width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from segcompass.evaluation.metrics import Metrics
from segcompass.evaluation.scoring import PairScore
from segcompass.io.errors import DataError

SPLITS = ("train", "val")
BINS = 10
FIGURES = ("samples", "giou", "ciou", "giou_target", "n_acc", "t_acc")
SAME_TO = 9  # decimals in which two sums of IoU agree that count as equal


@dataclass(frozen=True)
class Bin:
    """Confidences from ``low`` up to, but for the last bin without, ``high``."""

    low: float
    high: float
    count: int
    confidence: float | None  # mean; None in an empty bin
    frequency: float | None  # share of them that came true


@dataclass(frozen=True)
class Reliability:
    """How often what was said with some confidence came true."""

    bins: tuple[Bin, ...]
    error: float | None  # expected calibration error, in [0, 1]; None where nothing was said


@dataclass(frozen=True)
class Calibration:
    """The threshold of highest gIoU, and what it was read from."""

    split: str
    threshold: float
    as_run: dict[str, Any]  # figures with the threshold of the run
    calibrated: dict[str, Any]  # figures with this one
    slots: Reliability  # a slot's confidence, against having matched a target at IoU 0.5
    presence: Reliability  # the highest confidence of an answer, against there being a target

    def result(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


def calibrate(scores: Iterable[PairScore], split: str, control: str | None = None) -> Calibration:
    """Calibrate on the scores of one run.

    Args:
        scores: of ``score_sample``; answers that are not well-formed count with IoU 0 throughout.
        split: the split that was run, train or val.
        control: of the run; only a run without one says anything about confidences.

    Raises:
        DataError: another split, a run with a control, or no samples.
        ValueError: a score was made without the single slots.
    """
    if split not in SPLITS:
        raise DataError(f"a threshold is chosen on {' or '.join(SPLITS)}, not on {split!r}")
    if control is not None:
        raise DataError(
            f"the run was made with --control {control}: its answers are meant to be wrong; "
            "run the evaluation without it"
        )
    run = list(scores)
    if not run:
        raise DataError("there are no samples to choose a threshold on; run the evaluation first")
    threshold = best_threshold(run)
    answers = [s for s in run if s.confidences]
    return Calibration(
        split=split,
        threshold=threshold,
        as_run=_figures(run),
        calibrated=_figures([s.at(threshold) for s in run]),
        slots=reliability(
            [c for s in answers for c in s.confidences[: len(s.detections)]],
            [bool(matched & 1) for s in answers for matched in s.detections],
        ),
        presence=reliability([s.confidences[0] for s in answers], [s.has_target for s in answers]),
    )


def best_threshold(scores: Sequence[PairScore]) -> float:
    """The threshold of highest gIoU, half-way between two confidences that occur.

    Lowering the threshold past a confidence lets one more slot count, which changes its sample's
    IoU; the sums of these changes are the gIoU at every threshold. Of equals the highest is taken.
    """
    steps = [
        (confidence, score.with_slots(k).iou - score.with_slots(k - 1).iou)
        for score in scores
        for k, confidence in enumerate(score.confidences, start=1)
        if confidence > 0  # no threshold lets a slot of confidence 0 count
    ]
    confidences, gains = np.array(steps).reshape(-1, 2).T
    levels, place = np.unique(-confidences, return_inverse=True)
    gained = np.cumsum(np.bincount(place, weights=gains, minlength=len(levels)))
    best = int(np.argmax(np.round([0.0, *gained], SAME_TO)))
    edges = [1.0, *-levels, 0.0]
    return float(edges[best] + edges[best + 1]) / 2


def reliability(confidences: Sequence[float], came_true: Sequence[bool]) -> Reliability:
    """Compare confidences in [0, 1] with how often they came true."""
    said, true = np.asarray(confidences, dtype=np.float64), np.asarray(came_true, dtype=np.float64)
    edges = np.arange(BINS + 1) / BINS
    place = np.clip(np.searchsorted(edges, said, side="right") - 1, 0, BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    sums = [np.bincount(place, weights=values, minlength=BINS) for values in (said, true)]
    bins = tuple(
        Bin(float(low), float(high), int(n), *((float(a / n), float(b / n)) if n else (None, None)))
        for (low, high), n, a, b in zip(pairwise(edges), counts, *sums, strict=True)
    )
    error = float(np.abs(sums[0] - sums[1]).sum() / len(said)) if len(said) else None
    return Reliability(bins, error)


def _figures(scores: Sequence[PairScore]) -> dict[str, Any]:
    result = Metrics(scores).result(resamples=0)
    return {name: result[name] for name in FIGURES}
