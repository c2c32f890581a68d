"""Metrics: the figures of small sets by hand, and of random ones by the text of the protocol."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_sets import Answer, random_answers

from segcompass.evaluation.metrics import Metrics
from segcompass.evaluation.scoring import PairScore, score_pair
from segcompass.types import Status

EMPTY = np.zeros((4, 5), dtype=bool)


def cells(*columns: int) -> np.ndarray:
    """Whole columns of a 4x5 picture: 4 px each."""
    mask = EMPTY.copy()
    mask[:, list(columns)] = True
    return mask


def test_figures_of_a_small_set_by_hand() -> None:
    metrics = Metrics()
    nothing = Status.NO_TARGET
    for score, kind, thought in (
        (score_pair(cells(0, 1), cells(1, 2)), "a", True),
        (score_pair(cells(1), cells(1)), "a", False),
        (score_pair(EMPTY, cells(1, 2), status=nothing), "b", None),
        (score_pair(EMPTY, EMPTY, status=nothing), "b", None),
        (score_pair(cells(3), EMPTY), "c", None),
        (score_pair(EMPTY, EMPTY, status=Status.MALFORMED), None, None),
    ):
        metrics.add(replace(score, kind=kind, reasoning_correct=thought))
    result = metrics.result()
    assert result["samples"] == 6
    assert result["giou"] == pytest.approx((1 / 3 + 1 + 0 + 1 + 0 + 0) / 6)
    assert result["ciou"] == pytest.approx((4 + 4) / (12 + 4 + 8 + 0 + 4 + 0))
    assert result["giou_target"] == pytest.approx((1 / 3 + 1 + 0) / 3)
    assert result["n_acc"] == pytest.approx(1 / 3)
    assert result["t_acc"] == pytest.approx(2 / 3)
    assert result["format_valid"] == pytest.approx(5 / 6)
    assert result["reasoning_target_accuracy"] == 0.5
    assert result["by_kind"] == {"a": pytest.approx(2 / 3), "b": 0.0, "c": None}
    assert [result[f"pr@{t}"] for t in (0.5, 0.7, 0.9)] == pytest.approx([1 / 3] * 3)


def test_precision_includes_its_threshold() -> None:
    result = Metrics([PairScore("x", 7, 10, 7 / 10, True, True)]).result(resamples=0)
    assert (result["pr@0.7"], result["pr@0.8"]) == (1.0, 0.0)


def test_undefined_figures_are_none_and_json_is_strict() -> None:
    nothing = Metrics().result()
    assert nothing["samples"] == 0
    assert nothing["giou"] is nothing["ciou"] is nothing["n_acc"] is None
    quiet = Metrics([score_pair(EMPTY, EMPTY)]).result()
    assert (quiet["giou"], quiet["n_acc"]) == (1.0, 1.0)
    assert quiet["ciou"] is quiet["t_acc"] is quiet["giou_target"] is quiet["pr@0.5"] is None
    assert quiet["intervals"]["ciou"] is None
    for result in (nothing, quiet):
        json.dumps(result, allow_nan=False)


def test_intervals_match_resampling_by_hand() -> None:
    rng = np.random.default_rng(7)
    scores = [
        PairScore(str(i), int(a), int(a + b), a / (a + b), True, True)
        for i, (a, b) in enumerate(rng.integers(1, 100, size=(200, 2)))
    ]
    result = Metrics(scores).result(seed=3)
    assert result == Metrics(scores).result(seed=3)
    means, ratios = [], []
    for _ in range(2000):
        drawn = [scores[i] for i in rng.integers(0, 200, size=200)]
        means.append(np.mean([s.iou for s in drawn]))
        ratios.append(sum(s.intersection for s in drawn) / sum(s.union for s in drawn))
    for name, values in (("giou", means), ("ciou", ratios)):
        np.testing.assert_allclose(
            result["intervals"][name], np.quantile(values, [0.025, 0.975]), atol=0.01
        )
        low, high = result["intervals"][name]
        assert low < result[name] < high


@given(seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=30)
def test_iou_is_symmetric_bounded_and_order_free(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = rng.random((5, 2, 6, 7)) < rng.random((5, 2, 1, 1))
    scores = [score_pair(a, b) for a, b in pairs]
    assert [s.iou for s in scores] == [score_pair(b, a).iou for a, b in pairs]
    assert all(0 <= s.iou <= 1 and s.intersection <= s.union for s in scores)
    forward = Metrics(scores).result(resamples=0)
    backward = Metrics(scores[::-1]).result(resamples=0)
    for name in ("giou", "ciou", "n_acc", "t_acc"):
        assert forward[name] == (None if backward[name] is None else pytest.approx(backward[name]))


def test_precision_over_instances_by_hand() -> None:
    # As in test_detection: hit, miss, miss, hit up to IoU 0.60, of three targets.
    all_levels, three_levels = 0b1111111111, 0b111
    scores = [
        scored(targets=2, confidences=(0.9, 0.8, 0.7), detections=(all_levels, 0, three_levels)),
        scored(targets=0, confidences=(0.85,), detections=(0,)),
        scored(targets=1),
    ]
    scores = [replace(score, sample_id=str(i)) for i, score in enumerate(scores)]
    result = Metrics(scores).result(resamples=300)
    assert (result["ap50"], result["ap75"]) == pytest.approx((0.5, 34 / 101))
    assert result["ap"] == pytest.approx((3 * 0.5 + 7 * 34 / 101) / 10)
    # A resample of the third sample alone has precision 0, one of the first alone (its 0.85 away)
    # 51/101 + 50/101 x 2/3 at 0.50.
    low, high = result["intervals"]["ap50"]
    assert (low, high) == pytest.approx((0.0, 51 / 101 + 50 / 101 * 2 / 3))


def test_union_masks_have_no_precision_over_instances() -> None:
    result = Metrics([score_pair(cells(1), cells(1))]).result()
    assert result["ap"] is result["ap50"] is result["intervals"]["ap"] is None
    assert result["by_targets"] == result["by_words"] == {}
    assert result["by_size"] == {"large": {"giou": 1.0, "ciou": 1.0, "samples": 1}}


def test_breakdowns_by_hand() -> None:
    scores = [
        # intersection, union, targets, share of the picture, words
        scored(5, 10, targets=1, target_share=0.0099, words=3),
        scored(10, 10, targets=2, target_share=0.01, words=4),
        scored(0, 20, targets=3, target_share=0.1, words=16),
        scored(6, 8, targets=7, target_share=0.5, words=200),
        scored(0, 0, targets=0, target_share=0.0, words=15),
    ]
    result = Metrics(scores).result(resamples=0)
    assert result["by_targets"] == {
        "0": {"giou": 1.0, "ciou": None, "samples": 1},
        "1": {"giou": 0.5, "ciou": 0.5, "samples": 1},
        "2": {"giou": 1.0, "ciou": 1.0, "samples": 1},
        "3+": {"giou": (0 + 0.75) / 2, "ciou": (0 + 6) / (20 + 8), "samples": 2},
    }
    assert list(result["by_targets"]) == ["0", "1", "2", "3+"]
    assert {name: bin_["samples"] for name, bin_ in result["by_size"].items()} == {
        "small": 1,
        "medium": 1,
        "large": 2,  # the sample without target has no size
    }
    assert result["by_size"]["large"]["ciou"] == 6 / 28
    assert {name: bin_["samples"] for name, bin_ in result["by_words"].items()} == {
        "1-3": 1,
        "4-7": 1,
        "8-15": 1,
        "16+": 2,
    }


def scored(intersection: int = 0, union: int = 0, **more: Any) -> PairScore:
    """A score of which only some numbers matter."""
    iou = intersection / union if union else 1.0
    return PairScore("x", intersection, union, iou, more["targets"] > 0, True, **more)


@given(seed=st.integers(0, 2**32), threshold=st.sampled_from([0.0, 0.25, 0.5, 0.9]))
@settings(deadline=None, max_examples=500)
def test_agrees_with_the_text_of_the_protocol(seed: int, threshold: float) -> None:
    answers = random_answers(seed)
    result = Metrics(answer.score(threshold) for answer in answers).result(resamples=0)
    for name, expected in by_the_protocol(answers, threshold).items():
        assert result[name] == (None if expected is None else pytest.approx(expected, abs=1e-9))
    for name in ("by_targets", "by_words"):  # the bins share out all samples
        of_bins = [bin_["samples"] * bin_["giou"] for bin_ in result[name].values()]
        assert sum(of_bins) / len(answers) == pytest.approx(result["giou"], abs=1e-9)


def by_the_protocol(answers: Sequence[Answer], threshold: float) -> dict[str, Any]:
    """The protocol, sentence by sentence, over sets of pixels."""
    ious, target_ious = [], []
    sum_intersection = sum_union = 0
    no_target_right, no_target_wrong, target_right, target_wrong = 0, 0, 0, 0
    for answer in answers:
        well_formed = answer.status == "ok"
        # Prediction and target are unions of instances, without the pixels that are ignored.
        target = pixels(answer.targets, answer.ignore)
        accepted = answer.slots[answer.confidences > threshold] if well_formed else []
        predicted = pixels(accepted, answer.ignore)
        says_nothing = well_formed and not predicted
        if not target and says_nothing:
            iou = 1.0  # no-target sample, predicted empty: nothing added to I or U
        elif not target:
            iou = 0.0  # predicted non-empty: its area still added to U
            sum_union += len(predicted)
        elif not predicted:
            iou = 0.0  # target present but predicted empty: I = 0, U = target area
            sum_union += len(target)
        else:
            iou = len(predicted & target) / len(predicted | target)
            sum_intersection += len(predicted & target)
            sum_union += len(predicted | target)
        ious.append(iou)
        if target:
            target_ious.append(iou)
            target_right += bool(predicted)
            target_wrong += not predicted
        else:
            no_target_right += says_nothing
            no_target_wrong += not says_nothing
    expected = {
        "giou": share(sum(ious), len(ious)),
        "ciou": share(sum_intersection, sum_union),
        "giou_target": share(sum(target_ious), len(target_ious)),
        "n_acc": share(no_target_right, no_target_right + no_target_wrong),
        "t_acc": share(target_right, target_right + target_wrong),
    }
    for level in (0.5, 0.6, 0.7, 0.8, 0.9):
        reached = [iou >= level for iou in target_ious]
        expected[f"pr@{level}"] = share(sum(reached), len(reached))
    return expected


def pixels(instances: Iterable[np.ndarray], ignore: np.ndarray | None) -> set[tuple[int, int]]:
    found = {(int(y), int(x)) for mask in instances for y, x in np.argwhere(mask)}
    return found if ignore is None else {pixel for pixel in found if not ignore[pixel]}


def share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def test_a_sample_is_drawn_with_all_its_scores() -> None:
    """Three seeds that agree tell no more about other samples than one."""
    rng = np.random.default_rng(4)
    ious = rng.random(12)
    once = [
        PairScore(f"s{i}", int(100 * v), 100, float(v), i % 3 > 0, True) for i, v in enumerate(ious)
    ]
    one, three = Metrics(once).result(), Metrics([*once, *once, *once]).result()
    for name in ("giou", "ciou", "n_acc", "t_acc"):
        assert three["intervals"][name] == pytest.approx(one["intervals"][name])
    apart = [replace(s, sample_id=f"{s.sample_id}-{seed}") for seed in range(3) for s in once]
    low, high = Metrics(apart).result()["intervals"]["giou"]
    assert high - low < 0.8 * (one["intervals"]["giou"][1] - one["intervals"]["giou"][0])
