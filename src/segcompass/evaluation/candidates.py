"""How good a choice among candidates was: against the best there was, and against each source.

Source: the oracle upper bound is what a perfect judge would reach with the same candidates. Where
nothing is to be found it rejects them all, as the source may; IoU by the gRefCOCO rules
(``scoring``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from segcompass.evaluation.scoring import score_pair
from segcompass.io import masks
from segcompass.types import Prediction, Sample


class Weighed(NamedTuple):
    """IoU of one answer, and of the others that could have been given."""

    chosen: float
    oracle: float  # of the best candidate, or of rejecting them all
    nothing: float  # of rejecting them all
    by_source: dict[str, float]  # of each source's first candidate, were it the only one


def weigh(prediction: Prediction, sample: Sample) -> Weighed:
    """Compare an answer with what it was chosen from; a malformed one scores 0 throughout.

    An answer that was not chosen among candidates counts as the direct one.

    Raises:
        ValueError: the picture is not of the sample's size.
    """
    target = masks.union(sample.targets, sample.image_hw)
    ignore = None if sample.ignore is None else masks.decode(sample.ignore)

    def iou(mask: np.ndarray) -> float:
        return score_pair(mask, target, ignore, status=prediction.status).iou

    chosen = iou(np.asarray(prediction.masks.any(axis=0)))
    nothing = iou(np.zeros(sample.image_hw, dtype=bool))
    candidates = prediction.candidates
    if candidates is None:
        return Weighed(chosen, max(chosen, nothing), nothing, {"direct": chosen})
    each = [iou(mask) for mask in candidates.masks]
    by_source = {
        source: value
        for names, value in zip(candidates.sources, each, strict=True)
        for source, _, rank in (name.partition(" ") for name in names.split(", "))
        if rank in ("", "1")
    }
    return Weighed(chosen, max([nothing, *each]), nothing, by_source)


def summary(weighed: Iterable[Weighed]) -> dict[str, Any]:
    """gIoU of the answers, of a perfect choice, and of every source by itself.

    A source that proposed nothing has said "nothing matches".

    Returns:
        samples, giou, oracle, by_source, best_source (the name of the highest of them); None where
        there are no samples.
    """
    rows = list(weighed)
    by_source = {
        name: float(np.mean([row.by_source.get(name, row.nothing) for row in rows]))
        for name in sorted({name for row in rows for name in row.by_source})
    }
    return {
        "samples": len(rows),
        "giou": float(np.mean([row.chosen for row in rows])) if rows else None,
        "oracle": float(np.mean([row.oracle for row in rows])) if rows else None,
        "by_source": by_source,
        "best_source": max(by_source, key=by_source.__getitem__, default=None),
    }
