"""The rows behind the figures, on answers whose figures are known by construction."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from synthetic_answers import answer, boxes, sample, square

from segcompass.explain.activation_patterns import ActivationPatterns
from segcompass.explain.correlation import (
    SHOWS,
    Quality,
    by_answer,
    correlations,
    quality,
    right_and_wrong,
    shows,
)
from segcompass.explain.instance_coverage import PERCENT, InstanceCoverage, coverage
from segcompass.explain.intervals import bootstrap, fit_line
from segcompass.explain.thoughts import answer_f1, thought_f1
from segcompass.explain.token_regions import on_instance, pixel_tokens, shares
from segcompass.types import NamedObject, Status


def test_every_pixel_belongs_to_the_patch_that_holds_its_centre() -> None:
    seen = pixel_tokens(boxes(), (40, 40))
    assert seen[0, 0] == 0 and seen[0, 39] == 3 and seen[39, 0] == 12
    assert (np.bincount(seen.ravel()) == 100).all()
    odd = pixel_tokens(np.array([[0, 0, 1.5, 2], [1.5, 0, 3, 2]]), (2, 3))
    assert odd.tolist() == [[0, 1, 1], [0, 1, 1]]  # the second pixel's centre is on the edge


def test_a_patch_lies_on_an_instance_from_a_quarter_of_its_pixels_on() -> None:
    target = square(0, 0, 15, 5)  # half of patch 0, a quarter of patch 1
    assert shares(boxes(), target[None])[0, :3].tolist() == [0.5, 0.25, 0.0]
    assert np.flatnonzero(on_instance(boxes(), target)).tolist() == [0, 1]
    target[0, 10] = False
    assert np.flatnonzero(on_instance(boxes(), target)).tolist() == [0]


def test_patterns_are_means_over_tokens_of_a_type() -> None:
    patterns = ActivationPatterns()
    # patch 0 is the instance: two concepts; patches 1 to 15: one active among them
    # questions have 3 tokens (16-18), thoughts 4 (19-22)
    active = {(0, 0): 0.5, (0, 1): 2.0, (5, 0): 0.5, (16, 2): 0.5, (19, 3): 2.0, (20, 3): 0.5}
    patterns.add(sample(0, square(0, 0, 10, 10)), answer(active))
    rows = {(row["tokens"], row["threshold"]): row for row in patterns.rows()}
    kinds = {kind for kind, _ in rows}
    at_zero = {kind: rows[kind, 0.0]["active"] for kind in kinds}
    assert at_zero == pytest.approx(
        {"instance": 2, "background": 1 / 15, "question": 1 / 3, "thought": 2 / 4}
    )
    one = min((tau for _, tau in rows), key=lambda tau: abs(tau - 1))
    at_one = {kind: rows[kind, one]["active"] for kind in at_zero}
    assert at_one == pytest.approx(
        {"instance": 1, "background": 0, "question": 0, "thought": 1 / 4}
    )
    assert rows["instance", 0.0]["n_tokens"] == 1


def test_coverage_counts_pixels_under_the_most_activated_patches() -> None:
    target = square(0, 0, 20, 10)  # patches 0 and 1, half each
    ranking = np.zeros(16)
    ranking[[1, 7, 0]] = 3, 2, 1
    found, chance = coverage(answer({}), target[None], ranking)
    by_percent = dict(zip(PERCENT, found[0], strict=True))
    # of 16 tokens, 5 % is one (0.8), 10 % two (1.6), 20 % three (3.2)
    assert [by_percent[p] for p in (1, 5, 10, 20, 100)] == [0, 0.5, 0.5, 1, 1]
    assert dict(zip(PERCENT, chance[0], strict=True))[10] == 2 / 16


def test_random_coverage_is_what_drawing_gives() -> None:
    """The exact mean against a simulation."""
    target = square(3, 7, 26, 31)
    said = answer({})
    _, chance = coverage(said, target[None], np.zeros(16))
    rng = np.random.default_rng(0)
    drawn = [coverage(said, target[None], rng.random(16))[0][0] for _ in range(400)]
    np.testing.assert_allclose(np.mean(drawn, axis=0), chance[0], atol=0.03)


def test_coverage_beats_chance_with_an_interval_above_zero() -> None:
    collected = InstanceCoverage()
    for number in range(20):
        place = number % 4 * 10
        active = {(number % 4, 0): 3.0, (15, 1): 1.0}
        collected.add(sample(number, square(place, 0, place + 10, 10)), answer(active))
    collected.add(sample(99), answer({(0, 0): 1.0}))  # no target: nothing to cover
    row = next(row for row in collected.rows() if row["percent"] == 5)
    assert row["n_instances"] == 20
    assert row["coverage"] == 1 and row["random"] == 1 / 16
    assert row["difference_low"] == row["difference_high"] == 1 - 1 / 16


def test_the_bootstrap_draws_pictures_not_samples() -> None:
    """Copies of a picture's samples must not narrow the interval."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30, 1))
    ones = np.ones((30, 1))
    mean = lambda sums: sums[:, :1] / sums[:, 1:]  # noqa: E731
    once = bootstrap(np.hstack([values, ones]), mean, range(30))
    copied = bootstrap(np.tile(np.hstack([values, ones]), (5, 1)), mean, [*range(30)] * 5)
    np.testing.assert_allclose(once, copied)
    assert once[1, 0] - once[0, 0] == pytest.approx(2 * 1.96 * values.std() / 30**0.5, rel=0.15)


def test_the_line_and_its_band_agree_with_the_textbook() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=40)
    y = 2 * x + rng.normal(size=40)
    line = fit_line(x, y)
    assert line is not None
    assert line.r == pytest.approx(np.corrcoef(x, y)[0, 1])
    # the mean at one place, by matrices
    design = np.column_stack([np.ones(40), x])
    beta, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    at = np.array([1.0, 0.7])
    error = (residual[0] / 38 * at @ np.linalg.inv(design.T @ design) @ at) ** 0.5
    low, high = line.band(np.array([0.7]))
    reach = stats.t.ppf(0.975, 38) * error
    assert (low[0], high[0]) == pytest.approx((at @ beta - reach, at @ beta + reach))


@pytest.mark.parametrize("x, y", [([1, 2, 3], [1, 2, 3]), ([1] * 5, range(5)), ([], [])])
def test_no_line_fits_too_little(x: list[float], y: list[float]) -> None:
    assert fit_line(np.array(x, dtype=float), np.array(list(y), dtype=float)) is None


def test_quality_stage_by_stage() -> None:
    found, heat = square(0, 0, 10, 10), square(0, 0, 20, 10) * np.float32(0.8)
    row = quality(sample(0, square(0, 0, 10, 20)), answer({}, found=found, heat=heat))
    assert row.mask_iou == 0.5
    assert row.heatmap_iou == pytest.approx(100 / 300)
    assert row.sae_error == 0.25
    # 20x20 cells: 25 found, 50 wanted, 25 in both; probabilities are 1 and 0 to 4e-4
    assert row.dice_loss == pytest.approx(1 - (2 * 25 + 1) / (25 + 50 + 1), abs=2e-3)
    assert row.thought_f1 is None and row.answer_f1 is None


def test_a_malformed_answer_has_no_heatmap_and_no_dice() -> None:
    bad = replace(answer({}), status=Status.MALFORMED, accepted=np.array([False]))
    row = quality(sample(0, square(0, 0, 10, 10)), bad)
    assert (row.mask_iou, row.heatmap_iou, row.dice_loss) == (0, None, None)


def test_one_slot_is_held_against_all_targets_together() -> None:
    both = square(0, 0, 20, 20) | square(20, 20, 40, 40)
    row = quality(sample(0, square(0, 0, 20, 20), square(20, 20, 40, 40)), answer({}, found=both))
    assert row.mask_iou == 1
    assert row.dice_loss == pytest.approx(0, abs=2e-3)


def test_an_answer_without_heatmaps_and_concepts_is_judged_by_its_mask() -> None:
    bare = dict.fromkeys(("codes", "sae_errors", "slot_heatmaps", "heatmap_logits"))
    said = replace(answer({}, found=square(0, 0, 10, 10)), **bare)
    row = quality(sample(0, square(0, 0, 10, 20)), said)
    assert shows(said) == set() and shows(answer({})) == {*SHOWS}
    assert (row.mask_iou, row.heatmap_iou, row.dice_loss, row.sae_error) == (0.5, None, None, None)
    assert row.counts and not quality(sample(0), said).counts


def test_thoughts_are_judged_by_the_names_they_hold() -> None:
    oracle = "I see red mug b4, blue mug c5. So the answer is red mug b4."
    assert thought_f1(oracle, oracle) == 1
    # 2 of 3 names said, 2 of 3 wanted: red mug b4 once, blue mug c5
    assert thought_f1("I see red mug b4, blue mug c5, red hat a1.", oracle) == pytest.approx(2 / 3)
    assert thought_f1("", oracle) == 0
    assert thought_f1("nothing", "nothing either") == 1


def test_conclusions_are_judged_by_the_things_they_name() -> None:
    things = tuple(
        NamedObject(i, "mug", colour, "medium", "plain", f"b{i + 1}")
        for i, colour in enumerate(("red", "blue", "green"))
    )
    asked = replace(sample(0), objects=things, target_ids=(0, 1))
    assert answer_f1(asked, "So the answer is red mug b1 and blue mug b2.") == 1
    assert answer_f1(asked, "So the answer is red mug b1.") == pytest.approx(2 / 3)
    assert answer_f1(asked, "So the answer is green mug b3.") == 0
    assert answer_f1(asked, "So nothing matches.") == 0
    assert answer_f1(asked, "who knows") == 0
    assert answer_f1(replace(asked, target_ids=()), "So nothing matches.") == 1


def _rows(n: int = 20) -> list[Quality]:
    return [
        Quality(str(i), i, "ok", targets=1, mask_iou=i / n, heatmap_iou=i / n / 2,
                dice_loss=1 - i / n, sae_error=float(i % 7), thought_f1=0.5,
                answer_f1=float(i >= 10))
        for i in range(n)
    ]  # fmt: skip


def test_correlations_of_what_both_sides_have() -> None:
    first, *_ = _rows()
    rows = [*_rows(), replace(first, heatmap_iou=None), replace(first, targets=0)]
    rows.append(replace(first, status="malformed"))
    found = {pair.name: pair for pair in correlations(rows)}
    line = found["heatmap"].line
    assert line is not None
    assert (line.n, line.r, line.slope) == pytest.approx((20, 1, 2))
    assert found["thought_mask"].summary() == {"n": 21}  # one value of x: no line


def test_without_heatmaps_masks_remain() -> None:
    found = {pair.name: len(pair.x) for pair in correlations(_rows(), ())}
    assert found == {"thought_mask": 20, "answer_mask": 20}
    full, bare = by_answer(_rows()), by_answer(_rows(), ())
    assert [{k: v for k, v in row.items() if "heatmap" not in k} for row in full] == bare


def test_masks_by_range_and_by_right_conclusions() -> None:
    ranges = by_answer(_rows())
    assert [(r["low"], r["high"], r["samples"]) for r in ranges] == [(0, 0.25, 10), (0.75, 1, 10)]
    assert ranges[1]["mask_iou"] == pytest.approx(np.mean(np.arange(10, 20) / 20))
    split = right_and_wrong(_rows())
    assert split is not None and (split["n_right"], split["n_wrong"]) == (10, 10)
    assert split["difference"]["mask_iou"] == pytest.approx(0.5)
    low, high = split["difference"]["interval"]
    assert 0.3 < low < 0.5 < high < 0.7
    assert right_and_wrong([row for row in _rows() if row.answer_f1 == 1]) is None
