"""Average precision over instances, as COCO counts it: who matched whom, and the area under it.

Source: COCO's detection protocol as in COCOeval (area "all", 100 detections, one category), with
every (image, instruction) pair as an image of its own. docs/evaluation.md says the rules in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

MAX_DETECTIONS = 100
MATCH_AT = np.linspace(0.5, 0.95, 10)  # IoU; COCO's own expressions, to the last bit
RECALLS = np.linspace(0.0, 1.0, 101)


def match_targets(ious: Float[np.ndarray, "D N"]) -> tuple[int, ...]:
    """Give each detection, the most confident first, the best target that is still free.

    A target is taken by one detection only, and apart for every IoU threshold. Among targets of
    equal IoU the last one is taken.

    Args:
        ious: IoU of D detections in descending confidence with N targets.

    Returns:
        For each detection an integer whose bit t is set where it matched at ``MATCH_AT[t]``.
    """
    targets = ious.shape[1]
    levels = np.arange(len(MATCH_AT))
    free = np.ones((len(MATCH_AT), targets), dtype=bool)
    found = []
    for row in ious:
        fits = np.where(free & (row >= MATCH_AT[:, None]), row, -1.0)
        best = targets - 1 - np.argmax(fits[:, ::-1], axis=1)
        hits = levels[fits[levels, best] >= 0]
        free[hits, best[hits]] = False
        found.append(int((1 << hits).sum()))
    return tuple(found)


class Pool(NamedTuple):
    """All detections of a set in descending confidence; equal ones in the order of the samples."""

    owner: Int[np.ndarray, "D"]  # position of the sample a detection belongs to
    matched: Bool[np.ndarray, "D 10"]  # at each of MATCH_AT
    targets: Int[np.ndarray, "n"]  # target instances of each sample


def pool_detections(
    confidences: Sequence[Sequence[float]],
    detections: Sequence[Sequence[int]],
    targets: Sequence[int],
) -> Pool:
    """Lay the detections of n samples together.

    Args:
        confidences: of each sample's detections, descending; more than it has detections are cut.
        detections: of each sample, what ``match_targets`` returned.
        targets: number of target instances of each sample.
    """
    lengths = [len(found) for found in detections]
    scores = np.fromiter(
        chain.from_iterable(c[:n] for c, n in zip(confidences, lengths, strict=True)), np.float64
    )
    bits = np.fromiter(chain.from_iterable(detections), np.int64)
    order = np.argsort(-scores, kind="stable")
    matched = (bits[order, None] >> np.arange(len(MATCH_AT))) & 1 == 1
    owner = np.repeat(np.arange(len(lengths)), lengths)[order]
    return Pool(owner, matched, np.array(targets, dtype=np.int64))


def average_precision(pool: Pool, weights: Int[np.ndarray, "r n"]) -> Float[np.ndarray, "r 10"]:
    """Area under the interpolated precision-recall curve, for each of ``MATCH_AT``.

    Precision at a recall is the best that is reached there or further on; the area is its mean over
    the recalls 0, 0.01, … 1.

    Args:
        pool: the detections of n samples.
        weights: how often each sample is counted, in r ways; all ones for the set itself.

    Returns:
        Values in [0, 1]; NaN where no target is counted.
    """
    counted = weights[:, pool.owner]
    seen = np.cumsum(counted, axis=1)
    wanted = (weights @ pool.targets)[:, None]
    columns = [np.flatnonzero(hit) for hit in pool.matched.T]  # elsewhere the curve only falls
    areas = [_area_under_curve(counted[:, c], seen[:, c], wanted) for c in columns]
    return np.stack(areas, axis=1)


def _area_under_curve(
    counted: Int[np.ndarray, "r d"], seen: Int[np.ndarray, "r d"], wanted: Int[np.ndarray, "r 1"]
) -> Float[np.ndarray, " r"]:
    """The area, from the matched detections and how many of all were seen up to each."""
    found = np.cumsum(counted, axis=1)
    precision = found / np.maximum(seen, 1)
    best_from_here = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = found / np.maximum(wanted, 1)
    reached = np.searchsorted(RECALLS, recall, side="right")  # recalls that are no higher
    newly_reached = np.diff(reached, axis=1, prepend=0)
    area = (best_from_here * newly_reached).sum(axis=1) / len(RECALLS)
    return np.where(wanted[:, 0] > 0, area, np.nan)
