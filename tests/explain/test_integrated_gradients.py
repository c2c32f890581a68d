"""Integrated gradients against hand-computed values and against a plain fine sum."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from segcompass.concepts.sparse_codes import from_dense
from segcompass.explain.integrated_gradients import (
    Attribution,
    codebook_shares,
    integrated_gradients,
)
from segcompass.explain.replay import HeadInputs, head_inputs
from segcompass.geometry import Frame
from segcompass.interfaces.base import Alignment
from segcompass.pipeline import SegCompass
from segcompass.types import Prediction, Slots

CODEBOOK = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, -1.0]])
DENSE = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
Y = DENSE @ CODEBOOK  # [[3, -2], [0, 6]]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> SegCompass:
    return SegCompass.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def prediction(model: SegCompass) -> Prediction:
    image = np.random.default_rng(2).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    return model.predict(image, "the red mug", threshold=0.0)


class Quadratic:
    """A head with one slot whose confidence is Σ y² and whose 4x4 mask logits are all Σ y + 1."""

    class _Codebook:
        codebook = CODEBOOK

        def embed(self, codes: Any) -> Tensor:
            dense = torch.zeros(codes.n_rows, codes.n_columns)
            dense[codes.rows, codes.columns] = codes.values
            return dense @ CODEBOOK

        def aggregate(self, y: Tensor, valid: Tensor) -> Any:
            del valid
            sums = torch.stack([y.square().sum((1, 2)), y.sum((1, 2)) + 1], dim=1)
            return SimpleNamespace(vectors=sums[:, None])

    codebook = _Codebook()

    def fusion(self, tokens: Tensor, vectors: Tensor, gates: Tensor) -> Tensor:
        del tokens, gates
        return vectors

    def ground(self, queries: Tensor, keys: Tensor, frames: Any) -> Alignment:
        del frames
        heat = queries[..., 1, None, None].expand(-1, -1, *keys.shape[-2:])
        slots = Slots(heat[:, :, None], heat, queries[..., 0])
        return Alignment(slots.confidence_logits, slots)

    def decode(self, keys: Tensor, alignment: Alignment, *, frames: Any) -> Tensor:
        del keys, frames
        assert alignment.slots is not None
        return alignment.slots.heatmap_logits.repeat(1, 1, 4, 4)


def test_by_hand() -> None:
    inputs = HeadInputs(
        codes=from_dense(DENSE),
        readable=torch.ones(1, 2, dtype=torch.bool),
        tokens=torch.zeros(1, 1, 2),
        keys=torch.zeros(1, 1, 1, 1),
        gates=torch.ones(1, 2),
        frame=Frame.fit((4, 4), 4),
    )
    (confidence,), (mask,) = integrated_gradients(cast(Any, Quadratic()), inputs, [0])
    # The gradient of Σ y² averages y over the path: a pair weighs h C · y. Σ y: it weighs h Σ C.
    assert confidence.weights.tolist() == pytest.approx([1 * 3, 2 * (3 + 2), 3 * 2 * 6])
    assert (confidence.baseline, confidence.value) == pytest.approx((0, 9 + 4 + 36))
    assert mask.weights.tolist() == pytest.approx([1, 0, 6])
    assert (mask.baseline, mask.value) == pytest.approx((1, 8))
    assert max(confidence.residual_share, mask.residual_share) < 1e-5


def test_weights_add_up_to_the_change(model: SegCompass, prediction: Prediction) -> None:
    inputs = head_inputs(model, prediction)
    slots = list(range(len(prediction.slot_scores)))
    confidences, masks = integrated_gradients(model.interface, inputs, slots)
    for slot, confidence, mask in zip(slots, confidences, masks, strict=True):
        score = 1 / (1 + np.exp(-confidence.value))
        assert score == pytest.approx(float(prediction.slot_scores[slot]), abs=1e-5)
        logits = prediction.low_res_logits[slot]
        covered = logits[logits > 0] if (logits > 0).any() else logits
        assert mask.value == pytest.approx(float(covered.mean()), rel=1e-4, abs=1e-4)
    for found in [*confidences, *masks]:
        assert found.weights.shape == tuple(prediction.codes.values.shape)
        assert abs(found.residual) <= 0.02 * max(abs(found.change), 0.01)


def test_against_a_fine_sum_over_the_activations(model: SegCompass, prediction: Prediction) -> None:
    """Differentiate in the activations themselves, through the sparse codes, without the trick."""
    inputs = head_inputs(model, prediction)
    edges = np.concatenate([[0], np.geomspace(1e-5, 1, 400)])
    total = torch.zeros_like(inputs.codes.values)
    for start, end in pairwise(edges):
        values = (inputs.codes.values * (start + end) / 2).requires_grad_()
        alignment = model.interface.align_codes(
            inputs.codes._replace(values=values), inputs.readable, inputs.tokens, inputs.keys,
            frames=[inputs.frame], gates=inputs.gates,
        )  # fmt: skip
        logit = alignment.confidence_logits[0, 1]
        (gradient,) = torch.autograd.grad(logit, values)
        total += (end - start) * gradient * inputs.codes.values
    (confidence,), _ = integrated_gradients(model.interface, inputs, [1])
    largest = np.abs(confidence.weights).max()
    np.testing.assert_allclose(confidence.weights, total.numpy(), atol=0.02 * largest)


def test_codebook_shares(model: SegCompass, prediction: Prediction) -> None:
    codes = prediction.codes
    shares = codebook_shares(model.interface, codes)
    sums = np.bincount(codes.rows.numpy(), shares)[np.unique(codes.rows.numpy())]
    np.testing.assert_allclose(sums, 1, atol=1e-5)
    by_hand = codebook_shares(cast(Any, Quadratic()), from_dense(DENSE))
    # y_0 = (3, -2), |y_0|² = 13: concept 0 adds (1, 0), concept 2 adds (2, -2); y_1 is concept 1's.
    assert by_hand.tolist() == pytest.approx([3 / 13, 10 / 13, 1])


def test_residuals_by_hand() -> None:
    silent = Attribution(np.zeros(0), 1.5, 1.5)
    assert (silent.change, silent.residual, silent.residual_share) == (0, 0, 0)
    assert Attribution(np.array([0.5]), 3.0, 1.0).residual_share == 0.75
    assert Attribution(np.array([-3.0]), 1.0, 3.0).residual_share == 0.5
    # A change of 0.001 logits is too small to divide by: 0.01 stands in its place.
    assert Attribution(np.zeros(1), 1.001, 1.0).residual_share == pytest.approx(0.1)
