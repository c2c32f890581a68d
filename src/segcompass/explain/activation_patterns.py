"""How many concepts fire on question, thought, instance and background tokens (Fig. 4)."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from segcompass.explain.intervals import bootstrap
from segcompass.explain.token_regions import on_instance
from segcompass.io import masks
from segcompass.types import Prediction, Sample, TokenKind, given

KINDS = ("question", "thought", "instance", "background")
THRESHOLDS = np.concatenate([[0.0], np.geomspace(1e-3, 1e2, 51)])


def token_types(sample: Sample, prediction: Prediction) -> Int[np.ndarray, " L"]:
    """Index in :data:`KINDS` of every token; -1 for template, concentration tokens and padding."""
    kinds = prediction.token_kinds
    types = np.full(len(kinds), -1)
    types[kinds == TokenKind.INSTRUCTION] = KINDS.index("question")
    types[kinds == TokenKind.THOUGHT] = KINDS.index("thought")
    target = masks.union(sample.targets, sample.image_hw)
    here = on_instance(prediction.token_boxes, target)
    types[kinds == TokenKind.IMAGE] = np.where(
        here, KINDS.index("instance"), KINDS.index("background")
    )
    return types


class ActivationPatterns:
    """Counts active concepts by token type, sample by sample.

    Source: Fig. 4. For a threshold τ, the mean over tokens of one type of the number of concepts
    whose activation exceeds τ. Memory: one small table a sample.
    """

    def __init__(self) -> None:
        self._images: list[int] = []
        self._active: list[Int[np.ndarray, "4 thresholds"]] = []
        self._tokens: list[Int[np.ndarray, " 4"]] = []

    def add(self, sample: Sample, prediction: Prediction) -> None:
        """Count one more sample."""
        types = token_types(sample, prediction)
        codes = given(prediction.codes, "concepts")
        values = codes.values.numpy()
        of_code = types[codes.rows.numpy()]
        active = np.zeros((len(KINDS), len(THRESHOLDS)), dtype=np.int32)
        for kind in range(len(KINDS)):
            ordered = np.sort(values[of_code == kind])
            active[kind] = len(ordered) - np.searchsorted(ordered, THRESHOLDS, side="right")
        self._images.append(sample.image_id)
        self._active.append(active)
        self._tokens.append(np.bincount(types[types >= 0], minlength=len(KINDS)))

    def rows(self) -> list[dict[str, Any]]:
        """One row for each type and threshold, with the 95 % interval of the mean."""
        if not self._images:
            return []
        active, tokens = np.stack(self._active), np.stack(self._tokens)
        rows = []
        for kind, name in enumerate(KINDS):
            columns = np.column_stack([active[:, kind], tokens[:, kind]]).astype(np.float64)
            if not columns[:, -1].any():
                continue
            mean = _means(columns.sum(axis=0, keepdims=True))[0]
            low, high = bootstrap(columns, _means, self._images)
            rows += [
                {
                    "tokens": name,
                    "threshold": float(threshold),
                    "active": float(mean[i]),
                    "low": float(low[i]),
                    "high": float(high[i]),
                    "n_tokens": int(columns[:, -1].sum()),
                }
                for i, threshold in enumerate(THRESHOLDS)
            ]
        return rows


def _means(sums: Float[np.ndarray, "r c"]) -> Float[np.ndarray, "r thresholds"]:
    return np.asarray(sums[:, :-1] / sums[:, -1:])
