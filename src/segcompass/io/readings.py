"""Readings of the concepts: what slots and words have to do with them.

All of them need a prediction that has concepts; of others they raise a ValueError.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from segcompass.types import Prediction, TokenKind, given

TOP_CONCEPTS = 8
_TEXT_KINDS = (TokenKind.INSTRUCTION, TokenKind.THOUGHT)


class ConceptWeight(NamedTuple):
    """One SAE latent and how much it counts in some reading."""

    concept: int  # latent index in [0, S)
    weight: float  # > 0


class TokenActivation(NamedTuple):
    """What the concepts do on one text token."""

    position: int  # row in the sequence of L tokens
    text: str
    kind: TokenKind
    total: float  # sum of the token's activations
    concepts: tuple[ConceptWeight, ...]  # strongest first; weight is the activation


def code_matrix(prediction: Prediction) -> csr_array:
    """Return the activations as a sparse (L, S) matrix on the host.

    Raises:
        ValueError: if the codes do not describe the prediction's own tokens, or there are none.
    """
    codes = given(prediction.codes, "concepts")
    if codes.n_rows != len(prediction.tokens):
        raise ValueError(
            f"codes describe {codes.n_rows} tokens, the prediction has {len(prediction.tokens)}; "
            "both must come from the same pass"
        )
    values = codes.values.detach().float().cpu().numpy()
    rows, columns = codes.rows.cpu().numpy(), codes.columns.cpu().numpy()
    return csr_array((values, (rows, columns)), shape=(codes.n_rows, codes.n_columns))


def _strongest(weights: np.ndarray, top: int) -> tuple[ConceptWeight, ...]:
    """The ``top`` largest positive entries, largest first, ties by index."""
    order = np.argsort(-weights, kind="stable")[: max(top, 0)]
    return tuple(ConceptWeight(int(j), float(weights[j])) for j in order if weights[j] > 0)


def slot_concepts(
    prediction: Prediction, top: int = TOP_CONCEPTS
) -> list[tuple[ConceptWeight, ...]]:
    """For every slot, the concepts it reads most.

    The weight of concept j for slot k is Σ_t slot_attention[k, t] · activation[t, j]: the
    activation, weighted by where the slot attends. It says what was read, not what caused the
    mask; for causes, switch a concept off and look again.

    Returns:
        One tuple per slot, strongest first, at most ``top`` entries each.
    """
    codes, attention = code_matrix(prediction), given(prediction.slot_attention, "slot attention")
    weights = np.asarray(codes.T @ attention.T).T  # (K, S)
    return [_strongest(row, top) for row in weights]


def active_concepts(prediction: Prediction) -> int:
    """How many different concepts fire anywhere in the sequence."""
    return len(np.unique(given(prediction.codes, "concepts").columns.cpu().numpy()))


def word_activations(prediction: Prediction, top: int = 3) -> list[TokenActivation]:
    """For every token of the instruction and the thought, its activation and top concepts."""
    codes = code_matrix(prediction)
    readings = []
    for index in np.flatnonzero(np.isin(prediction.token_kinds, _TEXT_KINDS)):
        span = slice(codes.indptr[index], codes.indptr[index + 1])
        columns, values = codes.indices[span], codes.data[span]
        best = _strongest(values, top)
        readings.append(
            TokenActivation(
                position=int(index),
                text=prediction.tokens[index],
                kind=TokenKind(int(prediction.token_kinds[index])),
                total=float(values.sum()),
                concepts=tuple(ConceptWeight(int(columns[i]), weight) for i, weight in best),
            )
        )
    return readings


def token_heat(prediction: Prediction, top: int = TOP_CONCEPTS) -> np.ndarray:
    """For every slot and image token, how strongly the slot's top concepts fire there.

    It is the mean of their activations, weighted as in `slot_concepts`.

    Returns:
        float32 (K, n_image_tokens), in the order of ``prediction.token_boxes``.
    """
    image_codes = code_matrix(prediction)[prediction.token_kinds == TokenKind.IMAGE]
    heat = np.zeros((len(prediction.slot_scores), image_codes.shape[0]), dtype=np.float32)
    for row, concepts in zip(heat, slot_concepts(prediction, top), strict=True):
        if concepts:
            weights = np.array([c.weight for c in concepts])
            row[:] = image_codes[:, [c.concept for c in concepts]] @ (weights / weights.sum())
    return heat
