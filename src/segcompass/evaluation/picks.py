"""Which samples of a run are worth looking at: the worst, the best, the most doubtful, a few more.

A run has far more rows than a page can show, so each group is bounded and the rows are read one by
one; only those that are picked stay in memory.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from segcompass.evaluation.run_log import read_rows

EACH = 60  # samples in a group
GROUPS = ("worst", "best", "doubtful", "random")


class Pick(NamedTuple):
    """A row and the groups it is in."""

    row: dict[str, Any]
    groups: tuple[str, ...]
    margin: float | None  # from the threshold to the nearest confidence; None without confidences


class _Brief(NamedTuple):
    number: int
    iou: float
    union: int
    margin: float | None


def pick(path: Path, threshold: float, *, each: int = EACH, seed: int = 0) -> list[Pick]:
    """Choose from the rows of a ``samples.jsonl``.

    Worst are the lowest IoUs and best the highest, of equals those of the largest union first, so
    that much mistaken area comes before little. Most doubtful are those in which a confidence lies
    nearest to the threshold. The random ones are the same for the same seed.

    Args:
        path: the rows.
        threshold: confidence above which masks counted.
        each: samples in a group, at most.
        seed: of the random group.

    Returns:
        The chosen rows in the order of the file; a row may be in several groups.

    Raises:
        DataError: naming the line that is no row of an evaluation.
    """
    briefs = [
        _Brief(number, row["iou"], row["union"], _margin(row, threshold))
        for number, row in enumerate(read_rows(path))
    ]
    chosen = {
        "worst": _first(briefs, each, lambda b: (b.iou, -b.union)),
        "best": _first(briefs, each, lambda b: (-b.iou, -b.union)),
        "doubtful": _first(
            [b for b in briefs if b.margin is not None], each, lambda b: (b.margin,)
        ),
        "random": set(random.Random(seed).sample(range(len(briefs)), min(each, len(briefs)))),
    }
    picks = []
    for brief, row in zip(briefs, read_rows(path), strict=True):
        groups = tuple(name for name in GROUPS if brief.number in chosen[name])
        if groups:
            picks.append(Pick(row, groups, brief.margin))
    return picks


def _first(
    briefs: Sequence[_Brief], count: int, key: Callable[[_Brief], tuple[Any, ...]]
) -> set[int]:
    return {brief.number for brief in heapq.nsmallest(count, briefs, key)}


def _margin(row: dict[str, Any], threshold: float) -> float | None:
    return min((abs(c - threshold) for c in row["confidences"]), default=None)
