"""Candidates from hand-made maps and masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import make_prediction

from segcompass.geometry import Frame
from segcompass.interfaces.candidates import (
    Candidate,
    CandidateConfig,
    attention_peaks,
    direct,
    distinct,
    heatmap_peaks,
    iou,
    maxima,
    propose,
)


def grid(*rows: str) -> np.ndarray:
    """A map from digits."""
    return np.array([[int(c) for c in row] for row in rows], dtype=np.float64)


def box(y0: int, x0: int, y1: int, x1: int, hw: tuple[int, int] = (8, 8)) -> np.ndarray:
    mask = np.zeros(hw, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_maxima_are_local_highest_first_and_apart() -> None:
    scores = grid("9500000", "5500000", "0000070", "0000060", "3000000")
    # 5 stands beside 9, 6 beside 7; 3 is a maximum of its own
    assert maxima(scores, most=5, apart=1, floor=0.0) == [(0, 0), (2, 5), (4, 0)]
    assert maxima(scores, most=2, apart=1, floor=0.0) == [(0, 0), (2, 5)]
    assert maxima(scores, most=5, apart=1, floor=0.5) == [(0, 0), (2, 5)]  # 3 < 4.5
    assert maxima(scores, most=5, apart=5, floor=0.0) == [(0, 0)]  # all within 5 cells of 9


def test_a_plateau_is_one_maximum_and_a_flat_map_has_none() -> None:
    assert maxima(grid("0000", "0880", "0880", "0000"), most=9, apart=2, floor=0.1) == [(1, 1)]
    assert maxima(np.full((4, 4), 0.5), most=9, apart=1, floor=0.0) == []
    assert maxima(np.zeros((0, 3)), most=9, apart=1, floor=0.0) == []


def test_iou_by_hand() -> None:
    assert iou(box(0, 0, 2, 4), box(0, 2, 2, 6)) == 4 / 12
    assert iou(box(0, 0, 0, 0), box(0, 0, 0, 0)) == 1
    assert iou(box(0, 0, 1, 1), box(0, 0, 0, 0)) == 0


def test_distinct_keeps_the_first_of_a_kind_and_all_its_sources() -> None:
    first = Candidate(box(0, 0, 4, 4), ("direct",), (0, 1))
    same = Candidate(box(0, 0, 4, 4), ("slot 1",), (0,))
    nearly = Candidate(box(0, 0, 4, 3), ("slot 2",), (1,))  # IoU 12 / 16 with the first
    nothing = Candidate(box(0, 0, 0, 0), ("slot 3",), (2,))
    other = Candidate(box(4, 4, 8, 8), ("heatmap 1",), (0,))
    kept = distinct([first, same, nearly, nothing, other], overlap=0.8, each=3)
    assert [c.sources for c in kept] == [("direct", "slot 1"), ("slot 2",), ("heatmap 1",)]
    merged = distinct([first, same, nearly, nothing, other], overlap=0.75, each=3)
    assert [c.sources for c in merged] == [("direct", "slot 1", "slot 2"), ("heatmap 1",)]


def test_each_source_has_its_share_and_twins_cost_nothing() -> None:
    slots = [Candidate(box(k, 0, k + 1, 8), (f"slot {k + 1}",), (k,)) for k in range(4)]
    peak = Candidate(box(0, 0, 1, 8), ("heatmap 1",), (0,))
    second = Candidate(box(7, 0, 8, 8), ("heatmap 2",), (0,))
    kept = distinct([*slots, peak, second], overlap=0.9, each=1)
    assert [c.sources for c in kept] == [("slot 1", "heatmap 1"), ("heatmap 2",)]


def test_the_direct_mask_unites_what_the_source_accepts() -> None:
    prediction = make_prediction()  # accepts slots 0 and 2
    found = direct(prediction)
    assert found.slots == (0, 2) and found.sources == ("direct",)
    assert np.array_equal(found.mask, prediction.slot_masks[0] | prediction.slot_masks[2])
    nothing = direct(make_prediction(accepted=np.zeros(6, dtype=bool)))
    assert nothing.slots == () and not nothing.mask.any() and nothing.mask.shape == (256, 256)


def test_heatmap_peaks_lie_at_cell_centres_and_not_on_the_padding() -> None:
    logits = np.full((2, 4, 4), -9.0, dtype=np.float32)
    logits[0, 1, 2] = 9.0  # centre (2.5, 1.5) cells
    logits[0, 3, 0] = 9.0  # below the picture, which fills two of the four rows
    logits[1, 0, 0] = 0.0  # half sure
    prediction = make_prediction(
        heatmap_logits=logits, slot_scores=np.array([0.5, 0.8], dtype=np.float32)
    )
    frame = Frame.fit((20, 40), 64)  # scaled to 32 x 64; a cell is 16 px
    found = heatmap_peaks(prediction, frame, CandidateConfig(apart=1))
    assert [(peak.slot, peak.xy) for peak in found] == [(0, (40.0, 24.0)), (1, (8.0, 8.0))]
    sure = 1 / (1 + np.exp(-9.0))
    assert [peak.strength for peak in found] == pytest.approx([0.5 * sure, 0.8 * 0.5])
    assert heatmap_peaks(make_prediction(heatmap_logits=None), frame, CandidateConfig()) == []


def test_attention_peaks_are_the_middles_of_image_tokens() -> None:
    # 2 x 3 tokens of 10 px on a picture of 30 x 20; the last column saw padding alone
    boxes = [[x, y, x + 10, y + 10] for y in (0, 10) for x in (0, 10, 20)]
    boxes[2][2], boxes[5][2] = 20, 20
    weights = np.array([[[0.1, 0.0, 0.9], [0.0, 0.4, 0.0]]], dtype=np.float32)
    prediction = make_prediction(
        image_attention=weights, token_boxes=np.array(boxes, dtype=np.float32)
    )
    frame = Frame.fit((20, 30), 60)  # twice as large
    found = attention_peaks(prediction, frame, CandidateConfig(apart=1, floor=0.5))
    assert [(peak.slot, peak.xy) for peak in found] == [(0, (30.0, 30.0))]
    assert attention_peaks(make_prediction(), frame, CandidateConfig()) == []


def test_proposals_follow_the_sources_that_are_asked_for() -> None:
    prediction = make_prediction()
    frame = Frame.fit((256, 256), 256)
    asked: list[np.ndarray] = []

    def everything(points: np.ndarray) -> torch.Tensor:
        asked.append(points)
        return torch.full((len(points), 64, 64), 5.0)

    only = propose(prediction, everything, frame, CandidateConfig(sources=("direct",)))
    assert [c.sources for c in only] == [("direct",)] and not asked
    found = propose(prediction, everything, frame, CandidateConfig(sources=("direct", "heatmap")))
    assert len(asked) == 1 and len(found) == 2  # all peaks were answered with one same mask
    assert found[1].mask.all() and found[1].low_res is not None
    assert found[1].sources[0] == "heatmap 1" and len(found[1].sources) == len(asked[0])
