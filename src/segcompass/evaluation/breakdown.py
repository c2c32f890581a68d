"""Figures by number of targets, size of the target and length of the instruction."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from segcompass.evaluation.scoring import PairScore


class Bins(NamedTuple):
    """How samples are told apart by one number; a sample that has None is left out."""

    number: Callable[[PairScore], float | None]
    edges: tuple[float, ...]  # lowest number of every bin but the first
    labels: tuple[str, ...]

    def label(self, score: PairScore) -> str | None:
        """The bin of a sample."""
        number = self.number(score)
        return None if number is None else self.labels[bisect_right(self.edges, number)]


def _size(score: PairScore) -> float | None:
    return score.target_share if score.has_target else None


BINS = {
    "by_targets": Bins(lambda score: score.targets, (1, 2, 3), ("0", "1", "2", "3+")),
    "by_size": Bins(_size, (0.01, 0.1), ("small", "medium", "large")),
    "by_words": Bins(lambda score: score.words, (4, 8, 16), ("1-3", "4-7", "8-15", "16+")),
}


def break_down(scores: Sequence[PairScore]) -> dict[str, dict[str, dict[str, Any]]]:
    """giou, ciou and samples of every bin that has samples; ciou is None where no pixel counts."""
    return {name: _by_bin(scores, bins) for name, bins in BINS.items()}


def _by_bin(scores: Sequence[PairScore], bins: Bins) -> dict[str, dict[str, Any]]:
    members: dict[str, list[PairScore]] = {label: [] for label in bins.labels}
    for score in scores:
        label = bins.label(score)
        if label is not None:
            members[label].append(score)
    return {label: _figures(group) for label, group in members.items() if group}


def _figures(scores: Sequence[PairScore]) -> dict[str, Any]:
    union = sum(score.union for score in scores)
    return {
        "giou": sum(score.iou for score in scores) / len(scores),
        "ciou": sum(score.intersection for score in scores) / union if union else None,
        "samples": len(scores),
    }
