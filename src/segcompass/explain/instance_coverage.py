"""How much of an instance the most activated image tokens cover, against chance (Fig. 5)."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from segcompass.explain.intervals import bootstrap
from segcompass.explain.token_regions import pixel_counts
from segcompass.io.masks import decode
from segcompass.io.readings import code_matrix
from segcompass.types import Prediction, Sample, TokenKind

PERCENT = (1, 2, 5, *range(10, 101, 5))


def magnitudes(prediction: Prediction) -> Float[np.ndarray, " T"]:
    """Activation of every image token: the sum over its concepts."""
    codes = code_matrix(prediction)[prediction.token_kinds == TokenKind.IMAGE]
    return np.asarray(codes.sum(axis=1)).ravel()


def coverage(
    prediction: Prediction, targets: np.ndarray, ranking: Float[np.ndarray, " T"]
) -> tuple[Float[np.ndarray, "N percents"], Float[np.ndarray, "N percents"]]:
    """Part of each instance's pixels that the top K % of the image tokens see.

    Args:
        prediction: its ``token_boxes`` are used.
        targets: bool (N, height, width), none of them empty.
        ranking: of every image token, the largest first; ties in reading order.

    Returns:
        The coverage for every K of :data:`PERCENT`, and what K % random tokens cover on average:
        as each token is as likely as any other, the exact mean needs no drawing.
    """
    counts = pixel_counts(prediction.token_boxes, targets)
    parts = counts / targets.sum(axis=(1, 2))[:, None]
    taken = np.rint(np.array(PERCENT) / 100 * len(ranking)).astype(int)
    order = np.argsort(-ranking, kind="stable")
    reached = np.cumsum(np.pad(parts[:, order], ((0, 0), (1, 0))), axis=1)
    return reached[:, taken], parts.sum(axis=1)[:, None] * (taken / len(ranking))


class InstanceCoverage:
    """Collects coverage, instance by instance.

    Source: Fig. 5. Tokens are ranked by activation magnitude over all concepts; no segmentation is
    involved. Memory: two short rows an instance.
    """

    def __init__(self) -> None:
        self._images: list[int] = []
        self._rows: list[np.ndarray] = []

    def add(self, sample: Sample, prediction: Prediction) -> None:
        """Take in the sample's instances; samples without a target have none."""
        targets = [mask for mask in map(decode, sample.targets) if mask.any()]
        if not targets:
            return
        found, chance = coverage(prediction, np.stack(targets), magnitudes(prediction))
        self._rows += list(np.concatenate([found, chance], axis=1))
        self._images += [sample.image_id] * len(targets)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each K: both means, and their difference with its 95 % interval."""
        if not self._rows:
            return []
        columns = np.column_stack([self._rows, np.ones(len(self._rows))])
        figures = _figures(columns.sum(axis=0, keepdims=True))[0].reshape(3, -1)
        low, high = bootstrap(columns, _figures, self._images).reshape(2, 3, -1)
        return [
            {
                "percent": percent,
                "coverage": float(figures[0, i]),
                "coverage_low": float(low[0, i]),
                "coverage_high": float(high[0, i]),
                "random": float(figures[1, i]),
                "difference": float(figures[2, i]),
                "difference_low": float(low[2, i]),
                "difference_high": float(high[2, i]),
                "n_instances": len(self._rows),
            }
            for i, percent in enumerate(PERCENT)
        ]


def _figures(sums: Float[np.ndarray, "r c"]) -> Float[np.ndarray, "r f"]:
    found, chance = np.split(sums[:, :-1] / sums[:, -1:], 2, axis=1)
    return np.concatenate([found, chance, found - chance], axis=1)
