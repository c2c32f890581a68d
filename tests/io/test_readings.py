"""Readings of the concepts, against numbers worked by hand and the dense formulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import make_prediction

from segcompass.io import readings
from segcompass.types import Prediction, SparseCodes, TokenKind


def tiny_codes() -> Prediction:
    """Three tokens (image, instruction, thought), three concepts, two slots, worked by hand."""
    full = make_prediction()
    return replace(
        full,
        tokens=("<image>", "red", " mug"),
        token_kinds=np.array([TokenKind.IMAGE, TokenKind.INSTRUCTION, TokenKind.THOUGHT]),
        token_boxes=np.array([[0, 0, 256, 256]], dtype=np.float32),
        codes=SparseCodes(
            torch.tensor([0, 1, 1, 2]),
            torch.tensor([0, 0, 2, 1]),
            torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.bfloat16),
            n_rows=3,
            n_columns=3,
        ),
        slot_attention=np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=np.float32),
        slot_scores=full.slot_scores[:2],
        accepted=full.accepted[:2],
        slot_masks=full.slot_masks[:2],
    )


def test_slot_concepts_are_activations_weighted_by_attention() -> None:
    # slot 0: concept 0 = .5·1 + .5·2 = 1.5, concept 2 = .5·.5 = .25; slot 1: concept 1 = 1·4
    assert readings.slot_concepts(tiny_codes()) == [((0, 1.5), (2, 0.25)), ((1, 4.0),)]
    assert readings.slot_concepts(tiny_codes(), top=1) == [((0, 1.5),), ((1, 4.0),)]


def test_word_activations_cover_the_text_tokens_only() -> None:
    red, mug = readings.word_activations(tiny_codes())
    assert (red.text, red.kind, red.total) == ("red", TokenKind.INSTRUCTION, 2.5)
    assert red.concepts == ((0, 2.0), (2, 0.5))
    assert (mug.position, mug.concepts) == (2, ((1, 4.0),))


def test_token_heat_is_the_weighted_mean_of_the_slots_concepts() -> None:
    heat = readings.token_heat(tiny_codes())
    np.testing.assert_allclose(heat, [[1.5 / 1.75], [0.0]], rtol=1e-6)


def test_readings_agree_with_the_dense_formulation() -> None:
    prediction = make_prediction()
    dense = np.zeros((len(prediction.tokens), prediction.codes.n_columns), dtype=np.float32)
    dense[prediction.codes.rows, prediction.codes.columns] = prediction.codes.values
    weights = prediction.slot_attention @ dense
    for row, concepts in zip(weights, readings.slot_concepts(prediction, top=5), strict=True):
        assert [c.concept for c in concepts] == np.argsort(-row, kind="stable")[:5].tolist()
        np.testing.assert_allclose([c.weight for c in concepts], np.sort(row)[::-1][:5], rtol=1e-5)


def test_codes_of_another_pass_are_refused() -> None:
    prediction = make_prediction()
    with pytest.raises(ValueError, match="same pass"):
        readings.code_matrix(replace(prediction, tokens=prediction.tokens[1:]))


def test_what_has_no_concepts_is_refused_by_name() -> None:
    prediction = make_prediction(interface="latent_query")
    for read in (readings.code_matrix, readings.active_concepts, readings.slot_concepts):
        with pytest.raises(ValueError, match="no concepts"):
            read(prediction)
