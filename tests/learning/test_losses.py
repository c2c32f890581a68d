"""Losses against values by hand and against float64 formulations of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from segcompass.learning.losses import (
    confidence_bce,
    dice_loss,
    focal_loss,
    map_bce,
    pairwise_dice,
    soft_iou,
)

HALF, SURE = 0.0, 50.0  # logits of 1/2 and of (almost) 1


def maps(seed: int, count: int, side: int = 5) -> tuple[Tensor, Tensor]:
    """Random logits, and coverages of which many are exactly 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(count, side, side, generator=generator)
    cover = torch.rand(count, side, side, generator=generator) * 3 - 1
    return logits, cover.clamp(0, 1)


def reference(logits: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
    """All losses of each map, in float64, cell by cell."""
    found: dict[str, list[float]] = {"dice": [], "bce": [], "iou": [], "focal": []}
    for z, t in zip(logits.double().numpy(), targets.double().numpy(), strict=True):
        p = 1 / (1 + np.exp(-z))
        found["dice"].append(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
        found["bce"].append(float(np.mean(np.logaddexp(0, z) - t * z)))
        found["iou"].append((p * t).sum() / (p + t - p * t).sum())
        found["focal"].append(float(np.mean(np.abs(p - t) ** 2 * (np.logaddexp(0, z) - t * z))))
    return {name: np.array(values) for name, values in found.items()}


def test_values_by_hand() -> None:
    logits = torch.tensor([[[HALF, HALF], [HALF, HALF]]])
    targets = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    # overlap 1, sums 2 + 2: 1 - (2 + 1) / (4 + 1)
    assert dice_loss(logits, targets).tolist() == pytest.approx([0.4])
    assert map_bce(logits, targets).tolist() == pytest.approx([math.log(2)])
    assert soft_iou(logits, targets).tolist() == pytest.approx([1 / 3])  # 1 of 2 + 2 - 1


def test_perfect_and_empty_maps() -> None:
    full, none = torch.full((1, 2, 2), SURE), torch.full((1, 2, 2), -SURE)
    ones, zeros = torch.ones(1, 2, 2), torch.zeros(1, 2, 2)
    assert dice_loss(torch.cat([full, none]), torch.cat([ones, zeros])).tolist() == [0, 0]
    assert dice_loss(full, zeros).item() == pytest.approx(1 - 1 / 5)
    assert map_bce(full, zeros).item() == pytest.approx(SURE)
    nothing = torch.full((1, 2, 2), -200.0)  # sigmoid is 0 exactly
    assert soft_iou(nothing, zeros).tolist() == [1]


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_against_float64(seed: int, count: int) -> None:
    logits, targets = maps(seed, count)
    wanted = reference(logits, targets)
    ours = {"dice": dice_loss, "bce": map_bce, "iou": soft_iou, "focal": focal_loss}
    for name, loss in ours.items():
        np.testing.assert_allclose(loss(logits, targets), wanted[name], rtol=2e-5, atol=1e-6)


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(0, 5))
def test_pairs_are_the_dice_of_each_pair(seed: int, slots: int, count: int) -> None:
    logits, targets = maps(seed, slots)[0], maps(seed + 1, count)[1]
    pairs = pairwise_dice(logits, targets)
    assert pairs.shape == (slots, count)
    for k in range(slots):
        for n in range(count):
            one = dice_loss(logits[k : k + 1], targets[n : n + 1])
            torch.testing.assert_close(pairs[k, n], one[0])


def test_focal_loss_by_hand() -> None:
    """Where a map is half right, its cross-entropy counts a quarter; where it is sure, nothing."""
    logits = torch.tensor([[[HALF, SURE]], [[HALF, -SURE]]])
    targets = torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]]])
    undecided = math.log(2) / 4
    expected = [undecided / 2, (undecided + SURE) / 2]
    assert focal_loss(logits, targets).tolist() == pytest.approx(expected)
    plain = focal_loss(logits, targets, gamma=0.0)
    torch.testing.assert_close(plain, map_bce(logits, targets))


def test_confidence_by_hand() -> None:
    """One value for every slot, row by row."""
    logits = torch.tensor([[HALF, 2.0, -3.0], [2.0, HALF, HALF]])
    matched = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    half, wrong, right = math.log(2), math.log1p(math.exp(2)), math.log1p(math.exp(-3))
    wanted = [half, wrong, right, math.log1p(math.exp(-2)), half, half]
    assert confidence_bce(logits, matched).tolist() == pytest.approx(wanted)


def test_every_loss_pulls_towards_its_target() -> None:
    for loss, sign in ((dice_loss, 1), (map_bce, 1), (focal_loss, 1), (soft_iou, -1)):
        logits = torch.zeros(1, 2, 2, requires_grad=True)
        targets = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
        loss(logits, targets).sum().backward()
        assert logits.grad is not None
        assert (sign * logits.grad[0, 0, 0]).item() < 0  # descending raises the covered cell
        assert (sign * logits.grad[0, 1]).min() > 0  # and lowers the others
