"""Delete and insert the concepts of one answer, and score what is left of its masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.random import Generator

from segcompass.concepts.sparse_codes import select_columns
from segcompass.evaluation.scoring import score_pair
from segcompass.explain.intervene import answer_mask, overlap
from segcompass.explain.provenance import READINGS, provenance
from segcompass.explain.replay import head_inputs, replay
from segcompass.io import masks
from segcompass.pipeline import SegCompass
from segcompass.types import Prediction, Sample, given

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # of the concepts that fire in an answer
CURVES = ("deletion", "insertion")
ORDERS = ("attribution", "activation", "random")
MEASURES = ("iou", "agreement", "confidence")
COUNTS = (1, 2, 4, 8, 16, 32, 64)  # concepts kept alone
CHANGED = 0.9  # a mask has changed where its IoU with what it was falls below this

Order = Int[np.ndarray, " n"]  # concepts, first to last


@dataclass(frozen=True)
class Trial:
    """What deleting and inserting did to one answer."""

    image_id: int
    curves: Float[np.ndarray, "curves orders shares measures"]
    alone: Float[np.ndarray, "counts measures"]  # the first few concepts by attribution
    residuals: Float[np.ndarray, "slots 2"]  # of confidence and mask, as shares of their change
    slot_changed: tuple[bool, ...]  # accepted slots, each without its own first concept
    named_changed: tuple[bool, bool] | None  # as of `without_named`


class Surgery:
    """One answer under the knife: which concepts stay is chosen, everything else is replayed.

    Args:
        model: the model that answered.
        sample: with the target.
        prediction: the answer; at least one of its slots is accepted.
    """

    def __init__(self, model: SegCompass, sample: Sample, prediction: Prediction) -> None:
        self.model, self.sample, self.prediction = model, sample, prediction
        self.inputs = head_inputs(model, prediction)
        self.codes = given(prediction.codes, "concepts")
        self.active: Order = np.unique(self.codes.columns.numpy())
        self.target = masks.union(sample.targets, sample.image_hw)
        self.ignore = None if sample.ignore is None else masks.decode(sample.ignore)

    def keep(self, kept: Sequence[Order]) -> list[Prediction]:
        """What is found with these concepts alone, for each choice."""
        variants = []
        for concepts in kept:
            stays = torch.zeros(self.codes.n_columns, dtype=torch.bool)
            stays[torch.from_numpy(concepts)] = True
            variants.append(select_columns(self.codes, stays))
        return list(replay(self.model, self.prediction, variants, self.inputs))

    def drop(self, dropped: Sequence[Order]) -> list[Prediction]:
        """What is found without these concepts, for each choice."""
        return self.keep([np.setdiff1d(self.active, concepts) for concepts in dropped])

    def measures(self, found: Prediction) -> tuple[float, float, float]:
        """IoU with the target, IoU with the answer as it was, mean confidence of its slots."""
        mask = answer_mask(found)
        score = score_pair(mask, self.target, self.ignore, status=found.status)
        agreement = overlap(mask, answer_mask(self.prediction))
        return score.iou, agreement, float(found.slot_scores[self.prediction.accepted].mean())

    def without_named(self, named: Sequence[int], rng: Generator) -> tuple[bool, bool] | None:
        """Whether the answer changes without some concepts, and without as many drawn at random.

        Returns:
            Whether agreement falls below :data:`CHANGED`; None where none of the concepts fires.
        """
        present = np.intersect1d(self.active, np.asarray(named, dtype=int))
        if not len(present):
            return None
        drawn = rng.choice(self.active, len(present), replace=False)
        named_agrees, drawn_agrees = (self.measures(p)[1] for p in self.drop([present, drawn]))
        return named_agrees < CHANGED, drawn_agrees < CHANGED

    def curves(self, order: Order) -> Float[np.ndarray, "curves shares measures"]:
        """Delete, then insert, the first concepts of an order, a share at a time."""
        counts = [round(share * len(order)) for share in SHARES]
        deleted = self.keep([order[count:] for count in counts])
        inserted = self.keep([order[:count] for count in counts])
        return np.array([[self.measures(p) for p in found] for found in (deleted, inserted)])


def try_out(
    model: SegCompass,
    sample: Sample,
    prediction: Prediction,
    rng: Generator,
    *,
    draws: int,
    named: Sequence[int] | None = None,
) -> Trial:
    """Everything that is measured on one answer.

    Args:
        model: the model that answered.
        sample: what was asked, with its target.
        prediction: what was answered, with at least one accepted slot.
        rng: draws the random orders.
        draws: how many; their curves are averaged.
        named: concepts that name what is looked for.
    """
    surgery = Surgery(model, sample, prediction)
    slots = provenance(model, prediction)
    weights = np.stack([rank_weights(slot.concept_weights) for slot in slots])
    first = _ranked(weights.sum(0), surgery.active)
    codes = surgery.codes
    activation = np.bincount(codes.columns.numpy(), codes.values.numpy(), codes.n_columns)
    drawn = [surgery.curves(rng.permutation(surgery.active)) for _ in range(draws)]
    by_activation = surgery.curves(_ranked(activation, surgery.active))
    without_own = surgery.drop([_ranked(slot, surgery.active)[:1] for slot in weights])
    return Trial(
        image_id=sample.image_id,
        curves=np.stack([surgery.curves(first), by_activation, np.mean(drawn, axis=0)], axis=1),
        alone=np.array([surgery.measures(p) for p in surgery.keep([first[:n] for n in COUNTS])]),
        residuals=np.array([[s.confidence.residual_share, s.mask.residual_share] for s in slots]),
        slot_changed=tuple(
            _changed(prediction, after, slot.slot)
            for slot, after in zip(slots, without_own, strict=True)
        ),
        named_changed=surgery.without_named(named or [], rng),
    )


def rank_weights(weights: Float[np.ndarray, "S readings"]) -> Float[np.ndarray, " S"]:
    """One number a concept to rank by: what it adds to the mask, which is what is judged."""
    return weights[:, READINGS.index("mask")]


def _ranked(weights: Float[np.ndarray, " S"], active: Order) -> Order:
    """The active concepts, those that speak most for the answer first."""
    return active[np.argsort(-weights[active], kind="stable")]


def _changed(before: Prediction, after: Prediction, slot: int) -> bool:
    """Whether the slot's mask is another, or no longer counts."""
    if not after.accepted[slot]:
        return True
    return overlap(before.slot_masks[slot], after.slot_masks[slot]) < CHANGED
