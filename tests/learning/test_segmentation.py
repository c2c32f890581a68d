"""The supervised terms: which slot answers for which target, and what every pair costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_head, tiny_sae, tiny_sam
from torch import Tensor

from segcompass.data.samples import read_dataset
from segcompass.geometry import Frame, masks_to_grid
from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.interfaces.base import Alignment
from segcompass.interfaces.concept_slots import ConceptSlots
from segcompass.io import masks
from segcompass.learning.corpus import target_grid
from segcompass.learning.losses import dice_loss, focal_loss, map_bce
from segcompass.learning.rewards import RewardConfig, mask_score
from segcompass.learning.segmentation import (
    PlaceHead,
    Terms,
    segmentation_terms,
    wanted_maps,
)
from segcompass.types import Sample, Slots

SIDE, GRID, CHANNELS, WIDTH, K = 64, 8, 32, 32, 3  # of the tiny segmenter and head
OFF = -9.0
OF_PAIRS = ("heatmap_bce", "heatmap_dice", "mask_bce", "dice", "focal", "iou")


@pytest.fixture(scope="module")
def interface() -> ConceptSlots:
    decoder = MaskDecoder(tiny_sam())
    torch.manual_seed(1)
    return ConceptSlots(tiny_head(), tiny_sae(), decoder, policy_width=WIDTH, slots=K)


@pytest.fixture(scope="module")
def samples(scenes_root: Path) -> dict[int, Sample]:
    """One question for each number of targets, two at most."""
    found = {min(len(s.targets), 2): s for s in read_dataset(scenes_root, "train")}
    return {n: replace(s, targets=s.targets[:2]) for n, s in found.items()}


def keys_of(count: int) -> Tensor:
    return torch.randn(count, CHANNELS, GRID, GRID, generator=torch.Generator().manual_seed(2))


def frames_of(samples: list[Sample]) -> list[Frame]:
    return [Frame.fit(s.image_hw, SIDE) for s in samples]


def aligned(slots: Slots) -> Alignment:
    """Made-up slots with queries that tell them apart."""
    batch, count = slots.confidence_logits.shape
    queries = torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(3))
    return Alignment(slots.confidence_logits, slots, queries)


def slots_of(heatmaps: Tensor, confidences: Tensor | None = None) -> Slots:
    doubts = torch.zeros(heatmaps.shape[:2]) if confidences is None else confidences
    return Slots(torch.zeros(*heatmaps.shape[:2], 2, GRID, GRID), heatmaps, doubts)


@pytest.fixture
def judge(interface: ConceptSlots) -> Callable[..., Terms]:
    def run(samples: list[Sample], slots: Slots, **options: object) -> Terms:
        return segmentation_terms(
            interface, keys_of(len(samples)), aligned(slots), samples, frames_of(samples), **options
        )

    return run


def test_pictures_without_a_target_teach_only_doubt(
    judge: Callable[..., Terms], samples: dict[int, Sample]
) -> None:
    doubts = torch.tensor([[-1.0, 0.0, 2.0]])
    found = judge([samples[0]], slots_of(torch.randn(1, K, GRID, GRID), doubts))
    assert found.keys() == {"confidence", *OF_PAIRS}
    assert all(found[name].numel() == 0 for name in OF_PAIRS)
    by_hand = [math.log1p(math.exp(z)) for z in (-1, 0, 2)]
    assert found["confidence"].tolist() == pytest.approx(by_hand)


def test_every_mask_is_scored_against_its_own_target(
    judge: Callable[..., Terms], interface: ConceptSlots, samples: dict[int, Sample]
) -> None:
    """Slots 2 and 0 of the second picture draw its two targets, in this order."""
    batch = [samples[0], samples[2]]
    targets, hw = samples[2].targets, samples[2].image_hw
    coarse, fine = (target_grid(targets, hw, SIDE, g) for g in (GRID, 4 * GRID))
    logits = torch.full((2, K, GRID, GRID), OFF)
    logits[1, [2, 0]] = torch.logit(coarse, 1e-4)
    slots = slots_of(logits)
    found = judge(batch, slots)
    pairs = [(0, 1), (2, 0)]  # slot, target
    for row, (slot, target) in enumerate(pairs):
        chosen = torch.tensor([1]), torch.tensor([slot])
        mask = interface.decode(keys_of(2), aligned(slots), frames=frames_of(batch), select=chosen)
        own, other = fine[target][None], fine[1 - target][None]
        assert found["dice"][row].item() == pytest.approx(dice_loss(mask, own).item(), rel=1e-5)
        assert found["dice"][row].item() != pytest.approx(dice_loss(mask, other).item(), rel=1e-3)
        assert found["focal"][row].item() == pytest.approx(focal_loss(mask, own).item(), rel=1e-5)
        drawn, wanted = logits[1, slot][None], coarse[target][None]
        assert found["heatmap_bce"][row].item() == pytest.approx(map_bce(drawn, wanted).item())
        assert found["heatmap_dice"][row].item() == pytest.approx(dice_loss(drawn, wanted).item())
        both = ((mask > 0) & (own > 0.5)).sum() / ((mask > 0) | (own > 0.5)).sum()
        assert found["iou"][row].item() == pytest.approx(both.item())
    assert found["confidence"].tolist() == pytest.approx([math.log(2)] * 2 * K)


def test_confidences_are_told_which_slots_own_a_target(
    judge: Callable[..., Terms], samples: dict[int, Sample]
) -> None:
    coarse = target_grid(samples[1].targets, samples[1].image_hw, SIDE, GRID)
    logits = torch.full((1, K, GRID, GRID), OFF)
    logits[0, 1] = torch.logit(coarse[0], 1e-4)
    found = judge([samples[1]], slots_of(logits, torch.tensor([[-2.0, -1.0, -2.0]])))
    doubt, owns = math.log1p(math.exp(-2)), math.log1p(math.exp(1))
    assert found["confidence"].tolist() == pytest.approx([doubt, owns, doubt])


def test_only_matched_slots_are_decoded(
    judge: Callable[..., Terms],
    interface: ConceptSlots,
    samples: dict[int, Sample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded: list[int] = []
    plain = interface.decode

    def counted(*arguments: object, **options: object) -> Tensor:
        logits = plain(*arguments, **options)
        decoded.append(len(logits))
        return logits

    monkeypatch.setattr(interface, "decode", counted)
    judge([samples[0], samples[1], samples[2]], slots_of(torch.randn(3, K, GRID, GRID)))
    assert decoded == [0 + 1 + 2]


def test_gradients_reach_matched_maps_and_all_confidences(
    judge: Callable[..., Terms], samples: dict[int, Sample]
) -> None:
    coarse = target_grid(samples[1].targets, samples[1].image_hw, SIDE, GRID)
    logits = torch.full((1, K, GRID, GRID), OFF)
    logits[0, 2] = torch.logit(coarse[0], 1e-2)
    heatmaps, doubts = logits.requires_grad_(), torch.zeros(1, K, requires_grad=True)
    found = judge([samples[1]], slots_of(heatmaps, doubts))
    assert not found["iou"].requires_grad
    torch.stack([values.sum() for values in found.values()]).sum().backward()
    reached = heatmaps.grad.abs().sum((2, 3))[0]
    assert reached[2] > 0 and not reached[:2].any()
    assert doubts.grad.ne(0).all()


def test_order_settles_who_owns_what(
    judge: Callable[..., Terms], samples: dict[int, Sample]
) -> None:
    """Slots that draw alike: with a cost of order the first two own the two targets."""
    alike = slots_of(torch.zeros(1, K, GRID, GRID), torch.tensor([[0.0, 0.0, 1e-3]]))
    rows = {}
    for order in (0.0, 0.05):
        terms = judge([samples[2]], alike, order=order)
        owned = terms["confidence"] < torch.tensor([math.log(2)]) - 1e-5
        rows[order] = owned.tolist()
    assert rows[0.0][2] and not rows[0.05][2]


def test_the_place_head_is_asked_for_matched_slots_only(
    judge: Callable[..., Terms], samples: dict[int, Sample]
) -> None:
    torch.manual_seed(4)
    place = PlaceHead(WIDTH)
    coarse = target_grid(samples[1].targets, samples[1].image_hw, SIDE, GRID)
    logits = torch.full((1, K, GRID, GRID), OFF)
    logits[0, 1] = torch.logit(coarse[0], 1e-4)
    slots = slots_of(logits)
    found = judge([samples[1]], slots, place=place)
    expected = place.losses(aligned(slots).queries[:, 1], coarse)
    torch.testing.assert_close(found["place"], expected)
    nothing = judge([samples[0]], slots_of(logits[:1]), place=place)
    assert nothing["place"].numel() == 0


def test_the_place_head_wants_the_centre_of_mass() -> None:
    """The loss is that of the right bins, and a step along it makes them likelier."""
    torch.manual_seed(0)
    place = PlaceHead(16)
    queries = torch.zeros(2, 16, requires_grad=True)
    target = torch.zeros(2, 16, 16)
    target[0, 2:4, 4:6] = 1.0  # rows 2–3 and columns 4–5 of 16: row b, column 3 of 8
    target[1, 15, 0] = 0.5
    loss = place.losses(queries, target)
    loss.sum().backward()
    moved = (queries - queries.grad).detach()
    for head, bins in ((place.rows, (1, 7)), (place.columns, (2, 0))):
        before, after = head(queries).log_softmax(-1), head(moved).log_softmax(-1)
        for row, wanted in enumerate(bins):
            assert after[row, wanted] > before[row, wanted]
    rows, columns = place.rows(queries).log_softmax(-1), place.columns(queries).log_softmax(-1)
    expected = [-(rows[0, 1] + columns[0, 2]).item(), -(rows[1, 7] + columns[1, 0]).item()]
    assert loss.tolist() == pytest.approx(expected)


def test_more_targets_than_slots_leave_some_unmatched(
    judge: Callable[..., Terms], samples: dict[int, Sample]
) -> None:
    crowded = replace(samples[2], targets=samples[2].targets * 3)
    found = judge([crowded], slots_of(torch.randn(1, K, GRID, GRID)))
    assert found["dice"].shape == (K,)


def test_one_slot_answers_for_all_targets_together(samples: dict[int, Sample]) -> None:
    two, frame = samples[2], Frame.fit(samples[2].image_hw, SIDE)
    assert len(two.targets) == 2
    apart = wanted_maps(two, SIDE, GRID, together=False)
    together = wanted_maps(two, SIDE, GRID, together=True)
    whole = torch.from_numpy(masks.union(two.targets, two.image_hw))[None]
    union = masks_to_grid(whole, frame, GRID)
    torch.testing.assert_close(together, union)
    assert len(apart) == 2 and apart.sum() == pytest.approx(together.sum().item())
    drawn = 40 * (together > 0.5).float() - 20
    sharp = (together > 0.5).float()
    assert mask_score(drawn, sharp, RewardConfig()) == pytest.approx(1.0, abs=1e-3)
    assert wanted_maps(samples[0], SIDE, GRID, together=True).shape == (0, GRID, GRID)
