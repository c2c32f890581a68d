"""Where a slot comes from: the concepts and the tokens that made it, with signed weights.

Three readings of one (token, concept) pair stand side by side:
    confidence  what it adds to the slot's confidence logit (integrated gradients)
    mask        what it adds to the mean logit of the slot's mask (integrated gradients)
    read        its exact share of the token's codebook output, times the slot's attention to the
                token: what was read, not what it caused
Summed over tokens they weigh concepts, summed over concepts they weigh tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from segcompass.explain.integrated_gradients import (
    Attribution,
    codebook_shares,
    integrated_gradients,
)
from segcompass.explain.replay import head_inputs
from segcompass.explain.token_regions import on_instance
from segcompass.interfaces.concept_slots import with_concepts
from segcompass.pipeline import SegCompass
from segcompass.types import Prediction, SparseCodes, TokenKind, given

SCHEMA = "segcompass.provenance/1"
READINGS = ("confidence", "mask", "read")
GROUPS = ("question", "thought", "instance", "background", "template")


class Weight(NamedTuple):
    """One concept or token (by its number), and what it weighs in the three readings."""

    number: int
    confidence: float  # logits
    mask: float  # logits
    read: float  # share


@dataclass(frozen=True)
class SlotProvenance:
    """What made one slot."""

    prediction: Prediction
    slot: int
    confidence: Attribution
    mask: Attribution
    read: np.ndarray  # float64 (nnz,)

    @cached_property
    def pairs(self) -> Float[np.ndarray, "nnz 3"]:
        """Weights of all (token, concept) pairs, one column for each of READINGS."""
        return np.stack([self.confidence.weights, self.mask.weights, self.read], axis=1)

    @property
    def codes(self) -> SparseCodes:
        """The (token, concept) pairs that the weights are of."""
        return given(self.prediction.codes, "concepts")

    @cached_property
    def concept_weights(self) -> Float[np.ndarray, "S 3"]:
        """Weights of all concepts."""
        return self._sum(self.codes.columns.numpy(), self.codes.n_columns)

    @cached_property
    def token_weights(self) -> Float[np.ndarray, "L 3"]:
        """Weights of all tokens."""
        return self._sum(self.codes.rows.numpy(), self.codes.n_rows)

    def concepts(self, top: int = 10, by: str = "confidence") -> list[Weight]:
        """The concepts of largest weight, for or against, in one of READINGS."""
        return _heaviest(self.concept_weights, top, by)

    def tokens(self, top: int = 20, by: str = "confidence") -> list[Weight]:
        """The tokens of largest weight, for or against, in one of READINGS."""
        return _heaviest(self.token_weights, top, by)

    def groups(self) -> dict[str, dict[str, float]]:
        """Weights of question, thought, instance region, background and template.

        The groups part the tokens, so that each reading adds up to its whole.
        """
        named = token_groups(self.prediction, self.slot)
        return {
            name: dict(
                zip(READINGS, self.token_weights[named == name].sum(0).tolist(), strict=True)
            )
            for name in GROUPS
        }

    def _sum(self, index: np.ndarray, count: int) -> Float[np.ndarray, "count 3"]:
        columns = [np.bincount(index, weights, minlength=count) for weights in self.pairs.T]
        return np.stack(columns, axis=1)


def provenance(
    model: SegCompass, prediction: Prediction, slots: Sequence[int] | None = None
) -> list[SlotProvenance]:
    """Trace slots back to concepts and tokens.

    Args:
        model: the model that made the prediction.
        prediction: live or read back; the policy is not run again.
        slots: which ones; by default those that count, or the most confident one where none does.

    Raises:
        ValueError: the prediction cannot be replayed, or a slot does not exist.
    """
    chosen = _default_slots(prediction) if slots is None else list(slots)
    count = len(prediction.slot_scores)
    if not chosen or not all(0 <= slot < count for slot in chosen):
        raise ValueError(f"slots {chosen}: choose some of 0 to {count - 1}")
    inputs = head_inputs(model, prediction)
    interface = with_concepts(model.interface)
    confidences, masks = integrated_gradients(interface, inputs, chosen)
    shares = codebook_shares(interface, inputs.codes)
    rows = inputs.codes.rows.cpu().numpy()
    attention = given(prediction.slot_attention, "slot attention")[:, rows]  # (K, nnz)
    return [
        SlotProvenance(prediction, slot, confidence, mask, shares * attention[slot])
        for slot, confidence, mask in zip(chosen, confidences, masks, strict=True)
    ]


def token_groups(prediction: Prediction, slot: int) -> np.ndarray:
    """The name in GROUPS of every token, as seen from one slot.

    An image token belongs to the instance where the slot's mask covers enough of it, by
    :func:`segcompass.explain.token_regions.on_instance`.

    Returns:
        str (L,); concentration tokens, which no concept reads, count as template.
    """
    groups = np.full(len(prediction.tokens), "template", dtype=object)
    groups[prediction.token_kinds == TokenKind.INSTRUCTION] = "question"
    groups[prediction.token_kinds == TokenKind.THOUGHT] = "thought"
    inside = on_instance(prediction.token_boxes, prediction.slot_masks[slot])
    groups[prediction.token_kinds == TokenKind.IMAGE] = np.where(inside, "instance", "background")
    return groups


def _default_slots(prediction: Prediction) -> list[int]:
    accepted = np.flatnonzero(prediction.accepted).tolist()
    return accepted or [int(prediction.slot_scores.argmax())]


def _heaviest(weights: Float[np.ndarray, "n 3"], top: int, by: str) -> list[Weight]:
    if by not in READINGS:
        raise ValueError(f"cannot rank by {by!r}; choose one of {', '.join(READINGS)}")
    sizes = np.abs(weights[:, READINGS.index(by)])
    order = np.argsort(-sizes, kind="stable")[: max(top, 0)]
    return [Weight(int(i), *map(float, weights[i])) for i in order if sizes[i] > 0]


def to_json(slots: Sequence[SlotProvenance], top: int = 10) -> dict[str, Any]:
    """Plain data, schema ``segcompass.provenance/1``: the heaviest concepts and tokens of each."""
    return {
        "schema": SCHEMA,
        "model": slots[0].prediction.model,
        "instruction": slots[0].prediction.instruction,
        "slots": [_slot_json(slot, top) for slot in slots],
    }


def _slot_json(slot: SlotProvenance, top: int) -> dict[str, Any]:
    prediction = slot.prediction
    named = token_groups(prediction, slot.slot)
    return {
        "slot": slot.slot,
        "accepted": bool(prediction.accepted[slot.slot]),
        "score": float(prediction.slot_scores[slot.slot]),
        "confidence": _scalar_json(slot.confidence),
        "mask": _scalar_json(slot.mask),
        "groups": slot.groups(),
        "concepts": [
            {"concept": weight.number} | _readings(weight) for weight in slot.concepts(top)
        ],
        "tokens": [
            {
                "position": weight.number,
                "text": prediction.tokens[weight.number],
                "group": str(named[weight.number]),
            }
            | _readings(weight)
            for weight in slot.tokens(2 * top)
        ],
    }


def _scalar_json(scalar: Attribution) -> dict[str, float]:
    return {
        "value": scalar.value,
        "baseline": scalar.baseline,
        "change": scalar.change,
        "residual": scalar.residual,
    }


def _readings(weight: Weight) -> dict[str, float]:
    return {"confidence": weight.confidence, "mask": weight.mask, "read": weight.read}


def table(slots: Sequence[SlotProvenance], top: int = 10) -> list[dict[str, str]]:
    """The heaviest concepts of each slot as rows, each with the token it weighs most on."""
    return [
        {
            "slot": str(slot.slot),
            "concept": str(weight.number),
            **{name: f"{value:+.3f}" for name, value in _readings(weight).items()},
            "mostly on": _main_token(slot, weight.number),
        }
        for slot in slots
        for weight in slot.concepts(top)
    ]


def _main_token(slot: SlotProvenance, concept: int) -> str:
    codes = slot.codes
    pairs = np.flatnonzero(codes.columns.numpy() == concept)
    heaviest = pairs[np.abs(slot.pairs[pairs, 0]).argmax()]
    return token_label(slot.prediction, int(codes.rows[heaviest]))


def token_label(prediction: Prediction, position: int) -> str:
    """A token as people read it: its text and position, or the patch of the picture it sees."""
    if prediction.token_kinds[position] != TokenKind.IMAGE:
        text = prediction.tokens[position]
        return f"{text.strip() or repr(text)} [{position}]"
    patch = int((prediction.token_kinds[:position] == TokenKind.IMAGE).sum())
    x0, y0, x1, y1 = prediction.token_boxes[patch].round().astype(int).tolist()
    return f"patch ({x0}, {y0})–({x1}, {y1})"
