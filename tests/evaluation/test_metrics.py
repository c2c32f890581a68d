"""Metrics: every rule of the protocol by hand, then the figures built from them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segcompass.evaluation.metrics import Metrics, PairScore, score_pair
from segcompass.types import Status

EMPTY = np.zeros((4, 5), dtype=bool)


def cells(*columns: int) -> np.ndarray:
    """Whole columns of a 4x5 picture: 4 px each."""
    mask = EMPTY.copy()
    mask[:, list(columns)] = True
    return mask


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
    score = score_pair(prediction, target)
    assert (score.intersection, score.union) == (intersection, union)
    assert score.iou == pytest.approx(iou)
    assert score.presence_correct is presence_correct


@pytest.mark.parametrize("status", [Status.MALFORMED, Status.TRUNCATED])
@pytest.mark.parametrize("prediction", [EMPTY, cells(1)])
def test_malformed_answers_score_nothing(status: Status, prediction: np.ndarray) -> None:
    nothing = score_pair(prediction, EMPTY, status=status)
    assert (nothing.iou, nothing.union, nothing.presence_correct) == (0.0, 0, False)
    something = score_pair(prediction, cells(1), status=status)
    assert (something.intersection, something.union, something.iou) == (0, 4, 0.0)
    assert not something.presence_correct


def test_ignored_pixels_leave_both_sides() -> None:
    score = score_pair(cells(0, 1, 2), cells(1, 2, 3), cells(0, 3))
    assert (score.intersection, score.union, score.iou) == (8, 8, 1.0)
    only_ignored = score_pair(cells(0), cells(3), cells(0, 3))
    assert (only_ignored.union, only_ignored.iou, only_ignored.has_target) == (0, 1.0, False)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="target has shape"):
        score_pair(EMPTY, EMPTY.T)
    with pytest.raises(ValueError, match="ignore has shape"):
        score_pair(EMPTY, EMPTY, EMPTY.T)


def test_figures_of_a_small_set_by_hand() -> None:
    metrics = Metrics()
    metrics.add(score_pair(cells(0, 1), cells(1, 2), kind="a", reasoning_correct=True))
    metrics.add(score_pair(cells(1), cells(1), kind="a", reasoning_correct=False))
    metrics.add(score_pair(EMPTY, cells(1, 2), kind="b", status=Status.NO_TARGET))
    metrics.add(score_pair(EMPTY, EMPTY, kind="b", status=Status.NO_TARGET))
    metrics.add(score_pair(cells(3), EMPTY, kind="c"))
    metrics.add(score_pair(EMPTY, EMPTY, status=Status.MALFORMED))
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
