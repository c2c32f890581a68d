"""Add scores up: gIoU, cIoU, N-acc, T-acc, Pr@t and average precision, with intervals.

docs/evaluation.md states every convention, with the formulae.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from segcompass.evaluation.breakdown import break_down
from segcompass.evaluation.detection import Pool, average_precision, pool_detections
from segcompass.evaluation.scoring import PairScore

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
BY_PATH = ("giou", "giou_target", "ciou", "n_acc", "t_acc")
RESAMPLES = 1000
CONFIDENCE = 0.95
RESAMPLING_CELLS = 200_000  # resamples x samples (or detections) held in memory at a time

Figures = dict[str, Float[np.ndarray, " r"]]  # NaN where a figure is undefined


class Metrics:
    """Collects scores and sums them up.

    The order of the samples changes nothing but rounding, and which of two detections of equal
    confidence comes first. Scores of one sample by several models (seeds) may be put together: the
    bootstrap draws them together.
    """

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
            t_acc, ap, ap50, ap75, format_valid, reasoning_target_accuracy, by_kind (giou_target of
            every kind), by_targets, by_size, by_words (giou, ciou, samples of every bin),
            by_path (giou, giou_target, ciou, n_acc, t_acc of each path alone, where all were
            measured so), pr@0.5 … pr@0.9 (over samples that have a target), and intervals: 95 %
            percentile bootstrap, [low, high] each.
        """
        columns, pool = self._columns(), self._pool()
        once = np.ones((1, len(self.scores)), dtype=np.int64)
        target_ious = [s.iou for s in self.scores if s.has_target]
        return {
            "samples": len(self.scores),
            **{name: _plain(value[0]) for name, value in _figures(columns, pool, once).items()},
            "format_valid": _mean([s.well_formed for s in self.scores]),
            "reasoning_target_accuracy": _mean(
                [s.reasoning_correct for s in self.scores if s.reasoning_correct is not None]
            ),
            "by_kind": self._by_kind(),
            **break_down(self.scores),
            "by_path": self._by_path(),
            **{f"pr@{t}": _mean([iou >= t for iou in target_ious]) for t in PRECISION_AT},
            "intervals": _intervals(columns, pool, self._numbers(), seed, resamples),
        }

    def _by_kind(self) -> dict[str, float | None]:
        kinds = sorted({s.kind for s in self.scores if s.kind is not None})
        return {
            k: _mean([s.iou for s in self.scores if s.kind == k and s.has_target]) for k in kinds
        }

    def _by_path(self) -> dict[str, dict[str, float | None]]:
        paths = set.intersection(*(set(s.paths) for s in self.scores)) if self.scores else set()
        return {
            path: {name: found[name] for name in BY_PATH}
            for path in sorted(paths)
            for found in [Metrics([s.along(path) for s in self.scores]).result(resamples=0)]
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

    def _numbers(self) -> Int[np.ndarray, " n"]:
        """The same number for all scores of a sample; scores without an id are of their own."""
        known: dict[str | int, int] = {}
        ids = [score.sample_id or i for i, score in enumerate(self.scores)]
        numbers = [known.setdefault(one, len(known)) for one in ids]
        return np.array(numbers, dtype=np.int64)

    def _pool(self) -> Pool:
        return pool_detections(
            [s.confidences for s in self.scores],
            [s.detections for s in self.scores],
            [s.targets or 0 for s in self.scores],
        )


def _figures(
    columns: Float[np.ndarray, "n 8"], pool: Pool, weights: Int[np.ndarray, "r n"]
) -> Figures:
    """The figures of r ways to count the samples."""
    sums = weights @ columns
    n, iou, intersection, union, target, target_iou, right_nothing, right_something = sums.T
    precision = average_precision(pool, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "giou": iou / n,
            "ciou": intersection / union,
            "giou_target": target_iou / target,
            "n_acc": right_nothing / (n - target),
            "t_acc": right_something / target,
            "ap": precision.mean(axis=1),
            "ap50": precision[:, 0],
            "ap75": precision[:, 5],
        }


def _intervals(
    columns: Float[np.ndarray, "n 8"],
    pool: Pool,
    numbers: Int[np.ndarray, " n"],
    seed: int,
    resamples: int,
) -> dict[str, list[float] | None]:
    """Percentile bootstrap; resamples in which a figure is undefined do not count for it."""
    drawn = [_figures(columns, pool, w) for w in _weights(numbers, pool, seed, resamples)]
    names = _figures(columns, pool, np.empty((0, len(columns)), dtype=np.int64))
    return {name: _interval([figures[name] for figures in drawn]) for name in names}


def _weights(
    numbers: Int[np.ndarray, " n"], pool: Pool, seed: int, resamples: int
) -> Iterator[Int[np.ndarray, "r n"]]:
    """How often each score is drawn, in chunks of resamples that fit into memory.

    Samples are what is drawn; scores of equal number are of one sample.
    """
    rng = np.random.default_rng(seed)
    n = int(numbers.max(initial=-1)) + 1
    chunk = max(1, RESAMPLING_CELLS // max(len(numbers), len(pool.owner), 1))
    for start in range(0, resamples if n else 0, chunk):
        rows = min(chunk, resamples - start)
        drawn = rng.integers(0, n, size=(rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)[:, numbers]


def _interval(chunks: list[Float[np.ndarray, " r"]]) -> list[float] | None:
    values = np.concatenate(chunks) if chunks else np.empty(0)
    defined = values[np.isfinite(values)]
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    return [float(q) for q in np.quantile(defined, tails)] if len(defined) else None


def _mean(values: Any) -> float | None:
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size else None


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
