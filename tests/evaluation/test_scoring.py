"""Scoring one answer: every rule of the protocol by hand, and against independent formulations."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_sets import Answer, random_answers
from pycocotools import mask as coco

from segcompass.evaluation.scoring import PairScore, score_pair, score_sample
from segcompass.io import masks
from segcompass.types import Status

EMPTY = np.zeros((4, 5), dtype=bool)


def cells(*columns: int) -> np.ndarray:
    """Whole columns of a 4x5 picture: 4 px each."""
    mask = EMPTY.copy()
    mask[:, list(columns)] = True
    return mask


def answer(
    targets: list[np.ndarray],
    slots: list[tuple[float, np.ndarray]],
    ignore: np.ndarray | None = None,
    status: Status = Status.OK,
) -> Answer:
    """An answer about the 4x5 picture."""
    return Answer(
        name="x",
        targets=np.array(targets, dtype=bool).reshape(-1, 4, 5),
        slots=np.array([slot for _, slot in slots], dtype=bool).reshape(-1, 4, 5),
        confidences=np.array([score for score, _ in slots], dtype=np.float32),
        ignore=ignore,
        status=status,
    )


@pytest.mark.parametrize(
    ("prediction", "target", "intersection", "union", "iou", "presence_correct"),
    [
        (cells(0, 1), cells(1, 2), 4, 12, 1 / 3, True),
        (cells(1), cells(1), 4, 4, 1.0, True),
        (EMPTY, cells(1, 2), 0, 8, 0.0, False),  # missed: the target's area is still owed
        (EMPTY, EMPTY, 0, 0, 1.0, True),  # rightly nothing: adds nothing to the sums
        (cells(3), EMPTY, 0, 4, 0.0, False),  # wrongly something: its area counts
        (cells(3), cells(1), 0, 8, 0.0, True),  # right that there is something
    ],
)
def test_rules_for_well_formed_answers(
    prediction: np.ndarray,
    target: np.ndarray,
    intersection: int,
    union: int,
    iou: float,
    presence_correct: bool,
) -> None:
    as_union = score_pair(prediction, target)
    as_slots = answer([target], [(0.9, prediction), (0.2, cells(0, 1, 2, 3, 4))]).score()
    for score in (as_union, as_slots):
        assert (score.intersection, score.union) == (intersection, union)
        assert score.iou == pytest.approx(iou)
        assert score.presence_correct is presence_correct


@pytest.mark.parametrize("status", [Status.MALFORMED, Status.TRUNCATED])
@pytest.mark.parametrize("prediction", [EMPTY, cells(1)])
def test_malformed_answers_score_nothing(status: Status, prediction: np.ndarray) -> None:
    for target, union in ((EMPTY, 0), (cells(1), 4)):
        for score in (
            score_pair(prediction, target, status=status),
            answer([target], [(0.9, prediction)], status=status).score(),
        ):
            assert (score.intersection, score.union, score.iou) == (0, union, 0.0)
            assert not score.presence_correct
            assert score.confidences == score.prefixes == score.detections == ()


def test_ignored_pixels_leave_both_sides() -> None:
    # Without columns 0 and 3 both masks are columns 1 and 2.
    for score in (
        score_pair(cells(0, 1, 2), cells(1, 2, 3), cells(0, 3)),
        answer([cells(1, 2, 3)], [(0.9, cells(0, 1, 2))], cells(0, 3)).score(),
    ):
        assert (score.intersection, score.union, score.iou) == (8, 8, 1.0)
        assert score.target_share == 8 / 12  # of the three columns that are not ignored


def test_all_ignored_is_an_empty_union() -> None:
    # Prediction and target differ, but only in ignored pixels: nothing to find, nothing found.
    for score in (
        score_pair(cells(0), cells(3), cells(0, 3)),
        answer([cells(3)], [(0.9, cells(0))], cells(0, 3)).score(),
    ):
        assert (score.union, score.iou, score.has_target, score.predicted_any) == (0, 1.0, 0, 0)
    nothing_left = answer([cells(3)], [(0.9, cells(0))], ~EMPTY).score()
    assert (nothing_left.iou, nothing_left.targets, nothing_left.target_share) == (1.0, 0, 0.0)


def test_instances_overlap_in_the_union_only_once() -> None:
    # Targets: columns 0-1 and 1-2, together 12 px. Accepted: columns 0-1 and 1-3, together 16 px.
    score = answer(
        [cells(0, 1), cells(1, 2)], [(0.7, cells(0, 1)), (0.8, cells(1, 2, 3)), (0.5, cells(4))]
    ).score(threshold=0.5)
    assert (score.intersection, score.union, score.targets) == (12, 16, 2)
    assert score.target_share == 12 / 20
    assert score.confidences == pytest.approx((0.8, 0.7, 0.5))
    # none; columns 1-3; columns 0-3; all five columns, though a confidence of 0.5 is not above it
    assert score.prefixes == ((0, 12), (8, 16), (12, 16), (12, 20))
    # Most confident first: columns 1-3 cover columns 1-2 with IoU 8/12, thresholds 0.50 to 0.65;
    # columns 0-1 are the first target; column 4 is nothing.
    assert score.detections == (0b1111, 0b1111111111, 0)


def test_equal_confidences_keep_the_order_of_the_slots() -> None:
    slots = [(0.6, cells(0)), (0.8, cells(1)), (0.6, cells(2))]
    score = answer([cells(0)], slots).score()
    # column 1 first, then column 0 before column 2
    assert score.prefixes == ((0, 4), (0, 8), (4, 8), (4, 12))
    assert score.detections == (0, 0b1111111111, 0)


def test_a_target_without_pixels_is_no_target() -> None:
    score = answer([EMPTY, cells(3)], [], cells(3)).score()
    assert (score.targets, score.has_target, score.iou) == (0, False, 1.0)


def test_an_empty_mask_is_a_detection_but_no_answer() -> None:
    score = answer([], [(0.9, EMPTY)]).score()
    assert (score.predicted_any, score.iou, score.detections) == (False, 1.0, (0,))


def test_only_a_hundred_detections_count_for_precision() -> None:
    slots = [(1 - i / 200, cells(1)) for i in range(100)] + [(0.4, cells(0))]
    score = answer([cells(0)], slots).score(threshold=0.3)
    assert len(score.detections) == 100
    assert not any(score.detections)
    assert (score.intersection, len(score.confidences)) == (4, 101)  # the answer is all of them


def test_words_of_the_instruction() -> None:
    asked = replace(answer([], []), instruction=" the mug,\nnearest to me ")
    assert asked.score().words == 5


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="target has shape"):
        score_pair(EMPTY, EMPTY.T)
    with pytest.raises(ValueError, match="ignore has shape"):
        score_pair(EMPTY, EMPTY, EMPTY.T)
    sample = answer([cells(1)], []).sample
    with pytest.raises(ValueError, match=r"\[5, 4\] for an image of \(4, 5\)"):
        score_sample(sample, [masks.encode(EMPTY.T)], [0.5], threshold=0.5)
    with pytest.raises(ValueError, match="1 slots, but 2 confidences"):
        score_sample(sample, [masks.encode(EMPTY)], [0.5, 0.6], threshold=0.5)


def test_rows_come_back_as_they_were() -> None:
    score = answer([cells(1)], [(0.7, cells(1)), (0.3, cells(2))]).score()
    row = json.loads(json.dumps(asdict(score) | {"text": "more of the row"}))
    assert PairScore.from_row(row) == score
    with pytest.raises(KeyError):
        PairScore.from_row({"sample_id": "x"})
    with pytest.raises(ValueError, match="fine"):
        PairScore.from_row(row | {"status": "fine"})
    with pytest.raises(TypeError):
        PairScore.from_row(row | {"prefixes": [3]})


def test_another_threshold() -> None:
    score = answer([cells(0)], [(0.75, cells(0)), (0.25, cells(1))]).score(threshold=0.5)
    assert score.at(0.5) == score
    assert (score.at(0.75).iou, score.at(0.75).status) == (0.0, Status.NO_TARGET)
    assert (score.at(0.1).intersection, score.at(0.1).union) == (4, 8)
    with pytest.raises(ValueError, match="as one mask"):
        score_pair(EMPTY, EMPTY).at(0.3)
    malformed = score_pair(EMPTY, EMPTY, status=Status.MALFORMED)
    assert malformed.at(0.3) is malformed


@given(seed=st.integers(0, 2**32), threshold=st.sampled_from([0.0, 0.25, 0.4, 0.5, 0.9, 1.0]))
@settings(deadline=None, max_examples=200)
def test_slots_and_their_union_score_alike(seed: int, threshold: float) -> None:
    """Run lengths against decoded masks, at this threshold and rejudged from another."""
    for asked in random_answers(seed):
        union = score_pair(
            asked.slots[asked.confidences > threshold].any(axis=0),
            asked.targets.any(axis=0),
            asked.ignore,
            status=asked.status,
        )
        names = ("intersection", "union", "iou", "has_target", "predicted_any", "target_share")
        for score in (asked.score(threshold), asked.score(0.7).at(threshold)):
            assert [getattr(score, n) for n in names] == [getattr(union, n) for n in names]


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=200)
def test_masks_and_iou_agree_with_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.random((2, *rng.integers(1, 40, size=2))) < rng.random((2, 1, 1))
    theirs = [coco.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in (first, second)]
    ours = [masks.encode(mask) for mask in (first, second)]
    assert [rle["counts"].encode() for rle in ours] == [rle["counts"] for rle in theirs]
    assert [masks.area(rle) for rle in ours] == [int(first.sum()), int(second.sum())]
    np.testing.assert_array_equal(masks.decode(ours[0]), first)
    if first.any() or second.any():
        iou = coco.iou(theirs[:1], theirs[1:], [0])[0, 0]
        assert score_pair(first, second).iou == pytest.approx(iou, abs=1e-9)
