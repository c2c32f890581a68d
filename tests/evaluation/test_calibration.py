"""Calibration: thresholds and reliability by hand, and against trying every threshold."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_sets import random_answers

from segcompass.evaluation.calibration import best_threshold, calibrate, reliability
from segcompass.evaluation.diagram import reliability_svg
from segcompass.evaluation.scoring import PairScore
from segcompass.io.errors import DataError
from segcompass.types import Status

SVG = "{http://www.w3.org/2000/svg}"


def scored(
    confidences: tuple[float, ...], prefixes: tuple[tuple[int, int], ...], **more: object
) -> PairScore:
    """A score as run with a threshold of 0.5."""
    detections = more.pop("detections", (0,) * len(confidences))
    has_target = prefixes[0][1] > 0
    score = PairScore(
        "x", 0, 0, 0.0, has_target, False, confidences=confidences, prefixes=prefixes,
        detections=detections, **more,
    )  # fmt: skip
    return score.at(0.5)


def a_set_by_hand() -> list[PairScore]:
    return [
        # IoU 0, 1, 0.5 with none, one, two slots
        scored((0.8, 0.4), ((0, 10), (10, 10), (10, 20)), detections=(1, 0)),
        # nothing to find: 1, 0
        scored((0.6,), ((0, 0), (0, 5))),
        # 0, 0.5
        scored((0.3,), ((0, 4), (2, 4)), detections=(1,)),
    ]


def test_threshold_by_hand() -> None:
    # Sums of IoU: none 0+1+0 = 1; past 0.8 1+1+0 = 2; past 0.6 1+0+0 = 1; past 0.4 0.5;
    # past 0.3 0.5+0+0.5 = 1. The best lies between 0.8 and 0.6.
    found = calibrate(a_set_by_hand(), "val")
    assert found.threshold == pytest.approx(0.7)
    # As run, at 0.5, the first answer is right and the second wrong, the third says nothing.
    assert found.as_run["giou"] == pytest.approx(1 / 3)
    assert (found.as_run["n_acc"], found.as_run["t_acc"]) == (0.0, 0.5)
    assert found.calibrated["giou"] == pytest.approx(2 / 3)
    assert (found.calibrated["n_acc"], found.calibrated["t_acc"]) == (1.0, 0.5)
    # 10 of 10 px, nothing, 0 of 4 px
    assert found.calibrated["ciou"] == pytest.approx(10 / 14)
    # Slots: 0.8 right, 0.4 wrong, 0.6 wrong, 0.3 right, each in a bin of its own.
    assert found.slots.error == pytest.approx((0.2 + 0.4 + 0.6 + 0.7) / 4)
    # Presence: 0.8 right, 0.6 wrong, 0.3 right.
    assert found.presence.error == pytest.approx((0.2 + 0.6 + 0.7) / 3)
    json.dumps(found.result(), allow_nan=False)


@pytest.mark.parametrize(
    ("scores", "threshold"),
    [
        # Saying nothing is best: half-way from the only confidence to 1.
        ([scored((0.6,), ((0, 0), (0, 5)))], 0.8),
        # Everything counts: half-way from the only confidence to 0.
        ([scored((0.6,), ((0, 5), (5, 5)))], 0.3),
        # The second slot changes nothing; of two equal thresholds the higher one.
        ([scored((0.6, 0.2), ((0, 5), (5, 5), (5, 5)))], 0.4),
        # Two slots of one confidence come and go together.
        ([scored((0.6, 0.6), ((0, 5), (5, 5), (5, 50)))], 0.3),
        ([scored((0.6, 0.6), ((0, 0), (0, 5), (0, 5)))], 0.8),
        # A slot of confidence 0 never counts, at 1 nothing does.
        ([scored((0.5, 0.0), ((0, 5), (3, 5), (5, 5)))], 0.25),
        ([scored((1.0,), ((0, 0), (0, 5)))], 1.0),
        # No slots at all.
        ([scored((), ((0, 5),))], 0.5),
    ],
)
def test_threshold_at_the_ends_and_with_ties(scores: list[PairScore], threshold: float) -> None:
    assert best_threshold(scores) == pytest.approx(threshold)


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=200)
def test_no_threshold_is_better(seed: int) -> None:
    scores = [answer.score() for answer in random_answers(seed)]
    found = calibrate(scores, "train")
    confidences = [c for score in scores for c in score.confidences]
    gious = [np.mean([s.at(t).iou for s in scores]) for t in [0.0, *confidences, 1.0]]
    assert found.calibrated["giou"] == pytest.approx(max(gious), abs=1e-9)
    assert found.as_run["giou"] == pytest.approx(np.mean([s.iou for s in scores]))


@pytest.mark.parametrize("split", ["test", "testA", "testB", "holdout"])
def test_no_threshold_from_a_test_split(split: str) -> None:
    with pytest.raises(DataError, match=split):
        calibrate(a_set_by_hand(), split)


def test_no_threshold_from_a_control() -> None:
    with pytest.raises(DataError, match="--control shuffle-images"):
        calibrate(a_set_by_hand(), "val", "shuffle-images")


def test_no_threshold_from_nothing() -> None:
    with pytest.raises(DataError, match="no samples"):
        calibrate([], "val")
    malformed = PairScore("x", 0, 4, 0.0, True, False, status=Status.MALFORMED)
    found = calibrate([malformed], "val")
    assert (found.threshold, found.calibrated["giou"], found.slots.error) == (0.5, 0.0, None)


def test_reliability_by_hand() -> None:
    # Bin 0.6-0.7: mean 0.65, half came true. Bin 0.3-0.4, whose lower edge belongs to it: 0.3,
    # never. Last bin: 1.0, always.
    found = reliability([0.62, 0.68, 0.3, 1.0], [True, False, False, True])
    assert [bin_.count for bin_ in found.bins] == [0, 0, 0, 1, 0, 0, 2, 0, 0, 1]
    assert found.bins[6].confidence == pytest.approx(0.65)
    assert (found.bins[6].frequency, found.bins[0].frequency) == (0.5, None)
    # Right and wrong make up for each other inside a bin, not between bins.
    assert found.error == pytest.approx((2 * 0.15 + 0.3 + 0.0) / 4)


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=100)
def test_calibration_error_by_its_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    said, true = rng.random(50), rng.random(50) < 0.5
    expected = 0.0
    for b in range(10):
        inside = (said >= b / 10) & (said < (b + 1) / 10)
        if inside.any():
            gap = abs(true[inside].mean() - said[inside].mean())
            expected += inside.mean() * gap
    assert reliability(said.tolist(), true.tolist()).error == pytest.approx(expected, abs=1e-9)


def test_diagram() -> None:
    found = reliability([0.62, 0.68, 0.3, 1.0], [True, False, False, True])
    drawn = ET.fromstring(reliability_svg(found, "slots <b>"))
    bars = [bar for bar in drawn.iter(f"{SVG}rect") if bar.find(f"{SVG}title") is not None]
    # Heights of the bins at 0.3, 0.6 and 0.9: never, half, always, of 240 px.
    assert [float(bar.get("height", "")) for bar in bars] == [0.0, 120.0, 240.0]
    assert [float(bar.get("x", "")) for bar in bars] == [44 + 72, 44 + 144, 44 + 216]
    texts = [text.text or "" for text in drawn.iter(f"{SVG}text")]
    assert "slots <b>: share that came true, ECE 0.150" in texts
    nothing = reliability_svg(reliability([], []), "slots")
    assert "no confidences" in nothing
