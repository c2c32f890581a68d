"""Matching against brute force over all assignments."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from segcompass.learning.losses import dice_loss
from segcompass.learning.matching import Matches, match

SIDE = 4


def scene(seed: int, slots: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, confidences and targets of one picture."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1, slots, SIDE, SIDE, generator=generator)
    confidence = torch.randn(1, slots, generator=generator)
    targets = torch.rand(count, SIDE, SIDE, generator=generator).round()
    return logits, confidence, targets


def drawing(*cells: int) -> Tensor:
    """Logits of a map that is sure of these cells."""
    flat = torch.full((SIDE * SIDE,), -20.0)
    flat[list(cells)] = 20.0
    return flat.view(SIDE, SIDE)


def cost(logits: Tensor, confidence: Tensor, targets: Tensor, matches: Matches) -> float:
    """Total cost of an assignment in the first picture."""
    chosen = logits[0, matches.slots]
    dice = dice_loss(chosen, targets[matches.indices]).sum()
    return float(dice - confidence[0, matches.slots].sigmoid().sum())


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 5))
def test_no_assignment_is_cheaper(seed: int, slots: int, count: int) -> None:
    """With more targets than slots, too, where some targets stay without an owner."""
    logits, confidence, targets = scene(seed, slots, count)
    found = match(logits, confidence, [targets])
    owned = min(slots, count)
    assert len(set(found.slots.tolist())) == len(set(found.indices.tolist())) == owned
    costs = [
        [
            float(dice_loss(logits[0, k][None], targets[n][None]) - confidence[0, k].sigmoid())
            for n in range(count)
        ]
        for k in range(slots)
    ]
    if slots >= count:
        chosen = (
            zip(rows, range(count), strict=True) for rows in permutations(range(slots), count)
        )
    else:
        chosen = (zip(range(slots), cs, strict=True) for cs in permutations(range(count), slots))
    cheapest = min(sum(costs[k][n] for k, n in pairs) for pairs in chosen)
    assert cost(logits, confidence, targets, found) == pytest.approx(cheapest, abs=1e-5)


@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_the_order_of_targets_and_slots_does_not_matter(seed: int, rng: object) -> None:
    logits, confidence, targets = scene(seed, 5, 3)
    new_targets, new_slots = list(range(3)), list(range(5))
    rng.shuffle(new_targets)  # type: ignore[attr-defined]
    rng.shuffle(new_slots)  # type: ignore[attr-defined]
    plain = match(logits, confidence, [targets])
    mixed = match(logits[:, new_slots], confidence[:, new_slots], [targets[new_targets]])
    pairs = set(zip(plain.slots.tolist(), plain.indices.tolist(), strict=True))
    back = zip(mixed.slots.tolist(), mixed.indices.tolist(), strict=True)
    assert {(new_slots[slot], new_targets[index]) for slot, index in back} == pairs


@pytest.mark.parametrize("sure", [0, 1, 2])
def test_among_equal_maps_the_confident_slot_owns_the_target(sure: int) -> None:
    logits = drawing(1, 2).expand(1, 3, SIDE, SIDE)
    confidence = torch.full((1, 3), -1.0)
    confidence[0, sure] = 1.0
    assert match(logits, confidence, [drawing(1, 2)[None].sigmoid()]).slots.tolist() == [sure]


def test_a_much_better_map_outweighs_confidence() -> None:
    logits = torch.stack([drawing(0), drawing(5, 6)])[None]
    confidence = torch.tensor([[0.4, -0.4]])
    assert match(logits, confidence, [drawing(5, 6)[None].sigmoid()]).slots.tolist() == [1]


def test_pairs_of_a_batch_by_hand() -> None:
    """Pictures with one, no and two targets; targets come back in the order of the pairs."""
    logits = torch.stack(
        [
            torch.stack([drawing(0), drawing(1), drawing(2)]),
            torch.stack([drawing(0), drawing(1), drawing(2)]),
            torch.stack([drawing(9), drawing(8), drawing(7)]),
        ]
    )
    one, two = drawing(1)[None].sigmoid(), torch.stack([drawing(7), drawing(9)]).sigmoid()
    found = match(logits, torch.zeros(3, 3), [one, torch.zeros(0, SIDE, SIDE), two])
    assert found.images.tolist() == [0, 2, 2]
    assert found.slots.tolist() == [1, 0, 2]
    assert found.indices.tolist() == [0, 1, 0]
    assert torch.equal(found.targets, torch.stack([one[0], two[1], two[0]]))


def test_no_target_at_all() -> None:
    logits, confidence, _ = scene(0, 4, 0)
    found = match(logits, confidence, [torch.zeros(0, SIDE, SIDE)])
    assert [len(part) for part in found] == [0, 0, 0, 0]
    assert found.targets.shape == (0, SIDE, SIDE)
    assert found.images.dtype == found.slots.dtype == found.indices.dtype == torch.long


def test_no_gradient_flows_through_the_choice() -> None:
    logits, confidence, targets = scene(1, 4, 2)
    found = match(logits.requires_grad_(), confidence.requires_grad_(), [targets])
    assert not found.targets.requires_grad


def test_maps_that_are_not_finite_leave_the_complaint_to_the_loop() -> None:
    logits, confidence, targets = scene(1, 4, 2)
    logits[0, 1] = torch.nan
    assert len(match(logits, confidence, [targets]).slots) == 2


def test_order_settles_who_owns_what_while_all_slots_draw_alike() -> None:
    targets = [torch.eye(3)[:, :, None].expand(3, 3, 3).contiguous()]
    maps, confidences = torch.zeros(1, 4, 3, 3), torch.zeros(1, 4)
    matches = match(maps, confidences, targets, order=0.1)
    assert matches.slots.tolist() == [0, 1, 2]
    assert matches.indices.tolist() == [0, 1, 2]
