"""Average precision: greedy matching and the curve by hand, and the whole against COCOeval."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_sets import Answer, random_answers
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from segcompass.evaluation.detection import Pool, average_precision, match_targets, pool_detections
from segcompass.evaluation.metrics import Metrics
from segcompass.evaluation.scoring import PairScore
from segcompass.types import Status

ALL = 0b1111111111  # matched from IoU 0.50 to 0.95


@pytest.mark.parametrize(
    ("ious", "expected"),
    [
        # 0.625 reaches 0.50, 0.55 and 0.60.
        ([[0.625]], (0b111,)),
        # The threshold itself is enough, the smallest step below it is not.
        ([[0.5]], (0b1,)),
        ([[np.nextafter(0.5, 0)]], (0,)),
        # Both want the first target. The first detection has it up to 0.90, at 0.95 it is too bad
        # for it, and so is the second. What the second gets is the other target, up to 0.55.
        ([[0.91, 0.6], [0.8, 0.56]], (0b111111111, 0b11)),
        # A target is taken once: the better, but less confident, detection comes too late up to
        # 0.60 and has the target from 0.65 on.
        ([[0.625], [1.0]], (0b111, ALL - 0b111)),
        # Of two equal targets the last is taken. Where it is the one that the second detection
        # needs, that one is left without at 0.50.
        ([[0.5, 0.5], [0.0, 1.0]], (0b1, ALL - 0b1)),
        ([[0.5, 0.5], [1.0, 0.0]], (0b1, ALL)),
        # No detections.
        (np.empty((0, 2)), ()),
    ],
)
def test_greedy_matching(ious: Sequence[Sequence[float]], expected: tuple[int, ...]) -> None:
    assert match_targets(np.array(ious)) == expected


def a_set_by_hand() -> Pool:
    """Two targets and three detections; no target and one detection; a target, no detection."""
    return pool_detections(
        confidences=[(0.9, 0.8, 0.7), (0.85,), ()],
        detections=[(ALL, 0, 0b111), (0,), ()],
        targets=[2, 0, 1],
    )


def test_curve_by_hand() -> None:
    # In order: 0.9 hits, 0.85 (a picture without target) and 0.8 miss, 0.7 hits up to IoU 0.60.
    # Three targets. At 0.50: recall 1/3 with precision 1, recall 2/3 with precision 2/4. Of the
    # recalls 0, 0.01 … 1 the first 34 are no more than 1/3, the next 33 no more than 2/3:
    #     (34 x 1 + 33 x 0.5 + 34 x 0) / 101 = 0.5
    # From 0.65 on there is the first hit alone: 34 / 101.
    found = average_precision(a_set_by_hand(), np.ones((1, 3), dtype=np.int64))
    assert found.shape == (1, 10)
    np.testing.assert_allclose(found[0], [0.5] * 3 + [34 / 101] * 7, rtol=1e-12)


def test_precision_is_the_best_from_there_on() -> None:
    # miss, hit, hit, with two targets: precisions 0, 1/2, 2/3; every recall is held by the last.
    pool = pool_detections([(0.9, 0.8, 0.7)], [(0, ALL, ALL)], [2])
    np.testing.assert_allclose(average_precision(pool, np.ones((1, 1), np.int64)), 2 / 3)


def test_equal_confidences_go_by_the_order_of_the_samples() -> None:
    # hit, miss: precision 1 at recall 1. miss, hit: precision 1/2.
    for detections, expected in (([(ALL,), (0,)], 1.0), ([(0,), (ALL,)], 0.5)):
        targets = [int(found[0] == ALL) for found in detections]
        pool = pool_detections([(0.5,), (0.5,)], detections, targets)
        assert average_precision(pool, np.ones((1, 2), np.int64))[0, 0] == expected


def test_without_targets_it_is_undefined_and_without_detections_zero() -> None:
    nothing = pool_detections([(0.5,)], [(0,)], [0])
    assert np.isnan(average_precision(nothing, np.ones((1, 1), np.int64))).all()
    missed = pool_detections([()], [()], [2])
    assert not average_precision(missed, np.ones((1, 1), np.int64)).any()


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=100)
def test_weights_count_samples_as_if_repeated(seed: int) -> None:
    scores = [answer.score() for answer in random_answers(seed, ties=False)]
    weights = np.random.default_rng(seed).integers(0, 4, size=(3, len(scores)))
    weighted = average_precision(pool_of(scores), weights)
    for row, expected in zip(weights, weighted, strict=True):
        repeated = [s for s, times in zip(scores, row, strict=True) for _ in range(times)]
        once = np.ones((1, len(repeated)), dtype=np.int64)
        np.testing.assert_allclose(average_precision(pool_of(repeated), once)[0], expected)


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=500)
def test_agrees_with_coco_eval(seed: int) -> None:
    answers = random_answers(seed)
    result = Metrics(answer.score() for answer in answers).result(resamples=0)
    theirs = coco_precision(answers)
    for name, of_levels in (("ap", slice(None)), ("ap50", 0), ("ap75", 5)):
        expected = np.mean(theirs[of_levels])
        assert result[name] == (None if expected < 0 else pytest.approx(expected, abs=1e-9))


def test_agrees_with_coco_eval_beyond_a_hundred_detections() -> None:
    rng = np.random.default_rng(5)
    targets = rng.random((130, 12, 12)) < 0.1
    slots = targets ^ (rng.random(targets.shape) < 0.02)
    confidences = rng.integers(0, 60, size=130).astype(np.float32) / 64
    answer = Answer("x", targets, slots, confidences, None, Status.OK)
    result = Metrics([answer.score()]).result(resamples=0)
    assert 0.1 < result["ap"] == pytest.approx(coco_precision([answer]).mean(), abs=1e-9)


def pool_of(scores: Sequence[PairScore]) -> Pool:
    return pool_detections(
        [s.confidences for s in scores],
        [s.detections for s in scores],
        [s.targets or 0 for s in scores],
    )


def coco_precision(answers: Sequence[Answer]) -> np.ndarray:
    """AP at each IoU threshold by COCOeval; -1 where it is undefined."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        for index, side in enumerate((truth, found)):
            annotations = [a for i, x in enumerate(answers, 1) for a in _annotations(x, i)[index]]
            side.dataset = {
                "images": [_image(answer, i) for i, answer in enumerate(answers, 1)],
                "categories": [{"id": 1}],
                "annotations": [a | {"id": n} for n, a in enumerate(annotations, 1)],
            }
            side.createIndex()
        judge = COCOeval(truth, found, "segm")
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.params.maxDets = [100]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][:, :, 0, 0, 0]  # the category, area all, 100 detections
    return precision.mean(axis=1)


def _image(answer: Answer, image_id: int) -> dict:
    height, width = answer.targets.shape[1:]
    return {"id": image_id, "height": height, "width": width}


def _annotations(answer: Answer, image_id: int) -> tuple[list[dict], list[dict]]:
    """Targets and detections, as COCO wants them, without what is ignored."""
    visible = True if answer.ignore is None else ~answer.ignore
    targets = [mask & visible for mask in answer.targets]
    slots = [mask & visible for mask in answer.slots] if answer.status == "ok" else []
    truth = [_annotation(mask, image_id) for mask in targets if mask.any()]
    return truth, [
        _annotation(mask, image_id) | {"score": float(score)}
        for mask, score in zip(slots, answer.confidences, strict=False)
    ]


def _annotation(mask: np.ndarray, image_id: int) -> dict:
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    about = {"image_id": image_id, "category_id": 1, "iscrowd": 0, "area": int(mask.sum())}
    return about | {"segmentation": rle}
