"""Switch concepts off, turn them up or down, or add them, and look again.

An edit changes the sparse codes of one call before the codebook reads them. Nothing is kept in the
model, and the policy is not run again: its text stays what it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from segcompass.explain.replay import head_inputs, replay
from segcompass.io.outputs import to_json
from segcompass.pipeline import SegCompass
from segcompass.types import Prediction, SparseCodes

SCHEMA = "segcompass.intervention/1"


@dataclass(frozen=True)
class Edit:
    """What becomes of one concept: on every token read, h' = max(0, factor · h + shift).

    Make it with :meth:`ablate`, :meth:`scale` or :meth:`steer`.
    """

    concept: int  # latent index in [0, S)
    factor: float = 1.0  # >= 0
    shift: float = 0.0  # in the units of the activations

    def __post_init__(self) -> None:
        """Refuse what is no edit."""
        if self.concept < 0 or not 0 <= self.factor < math.inf or not math.isfinite(self.shift):
            raise ValueError(
                f"concept {self.concept} with factor {self.factor} and shift {self.shift}: want a "
                "concept >= 0, a finite factor >= 0 and a finite shift"
            )

    def __str__(self) -> str:
        """In words: "Concept 7 ×0.5"."""
        parts = [f"×{self.factor:g}"] if self.factor not in (0, 1) else []
        parts += ["off"] if self.factor == 0 else []
        parts += [f"{self.shift:+g}"] if self.shift or not parts else []
        return f"Concept {self.concept} {' '.join(parts)}"

    @classmethod
    def ablate(cls, concept: int) -> Edit:
        """Switch the concept off."""
        return cls(concept, factor=0.0)

    @classmethod
    def scale(cls, concept: int, factor: float) -> Edit:
        """Multiply the concept's activation wherever it fires."""
        return cls(concept, factor=factor)

    @classmethod
    def steer(cls, concept: int, shift: float) -> Edit:
        """Add to the concept's activation on every token that the SAE reads."""
        return cls(concept, shift=shift)


@dataclass(frozen=True)
class Intervention:
    """The same thought, read with and without the edits."""

    edits: tuple[Edit, ...]
    before: Prediction
    after: Prediction

    @property
    def confidence_change(self) -> np.ndarray:
        """float32 (K,): confidence after, less before."""
        return np.asarray(self.after.slot_scores - self.before.slot_scores)

    @property
    def mask_iou(self) -> np.ndarray:
        """float64 (K,): IoU of each slot's mask before and after; two empty masks agree."""
        pairs = zip(self.before.slot_masks, self.after.slot_masks, strict=True)
        return np.array([overlap(before, after) for before, after in pairs])

    @property
    def answer_iou(self) -> float:
        """IoU of the whole answer, the union of the accepted masks, before and after."""
        return overlap(answer_mask(self.before), answer_mask(self.after))

    def slot_rows(self) -> list[dict[str, Any]]:
        """For every slot: accepted, confidence and area before and after, Δ confidence, IoU."""
        changes, ious = self.confidence_change.tolist(), self.mask_iou.tolist()
        return [
            {
                "slot": k,
                "accepted_before": bool(self.before.accepted[k]),
                "accepted_after": bool(self.after.accepted[k]),
                "confidence_before": float(self.before.slot_scores[k]),
                "confidence_after": float(self.after.slot_scores[k]),
                "confidence_change": changes[k],
                "area_before": int(self.before.slot_masks[k].sum()),
                "area_after": int(self.after.slot_masks[k].sum()),
                "mask_iou": ious[k],
            }
            for k in range(len(changes))
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data, schema ``segcompass.intervention/1``."""
        return {
            "schema": SCHEMA,
            "edits": [asdict(edit) for edit in self.edits],
            "answer_iou": self.answer_iou,
            "slots": self.slot_rows(),
            "before": to_json(self.before),
            "after": to_json(self.after),
        }


def intervene(model: SegCompass, prediction: Prediction, edits: Sequence[Edit]) -> Intervention:
    """Replay a prediction with edited concepts.

    Both sides are computed here, in one batch, so that they differ by the edits alone.

    Args:
        model: the model that made the prediction.
        prediction: live or read back.
        edits: applied in order; no edits change nothing.

    Raises:
        ValueError: a concept does not exist, or the prediction cannot be replayed.
    """
    inputs = head_inputs(model, prediction)
    codes = edit_codes(inputs.codes, edits, inputs.readable[0])
    before, after = replay(model, prediction, [inputs.codes, codes], inputs)
    return Intervention(tuple(edits), before, after)


def edit_codes(
    codes: SparseCodes, edits: Sequence[Edit], readable: Bool[Tensor, " n"]
) -> SparseCodes:
    """The codes after all edits; the given ones stay as they are.

    Args:
        codes: of n tokens.
        edits: applied in order.
        readable: tokens that a concept can be added to.

    Raises:
        ValueError: an edit names a concept that the codes do not have.
    """
    for edit in edits:
        codes = _edited(codes, edit, readable)
    return codes


def _edited(codes: SparseCodes, edit: Edit, readable: Bool[Tensor, " n"]) -> SparseCodes:
    if edit.concept >= codes.n_columns:
        raise ValueError(
            f"there is no concept {edit.concept}; the model has 0 to {codes.n_columns - 1}"
        )
    chosen = codes.columns == edit.concept
    column = codes.values.new_zeros(codes.n_rows)
    column[codes.rows[chosen]] = codes.values[chosen]
    column = (edit.factor * column + edit.shift * readable).clamp(min=0)
    fires = column.nonzero().squeeze(-1)
    rows = torch.cat([codes.rows[~chosen], fires])
    columns = torch.cat([codes.columns[~chosen], torch.full_like(fires, edit.concept)])
    values = torch.cat([codes.values[~chosen], column[fires]])
    order = rows.argsort(stable=True)
    return codes._replace(rows=rows[order], columns=columns[order], values=values[order])


def answer_mask(prediction: Prediction) -> np.ndarray:
    """bool (height, width): all accepted masks together."""
    return np.asarray(prediction.slot_masks[prediction.accepted].any(axis=0))


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """IoU of two bool masks; 1 where both are empty."""
    union = np.count_nonzero(first | second)
    return float(np.count_nonzero(first & second) / union) if union else 1.0
