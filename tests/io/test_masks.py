"""Masks: run lengths, polygons of both conventions, boxes."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segcompass.io import masks
from segcompass.io.errors import DataError
from segcompass.types import Rle


def blobs(seed: int, height: int, width: int, density: float) -> np.ndarray:
    """Random noise joined to random discs and rings: thin parts, holes, diagonals, specks."""
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < density
    ys, xs = np.mgrid[:height, :width]
    for _ in range(3):
        cy, cx, radius = (
            rng.uniform(0, height),
            rng.uniform(0, width),
            rng.uniform(1, 1 + height / 2),
        )
        distance = np.hypot(ys - cy, xs - cx)
        mask |= (distance < radius) & (distance > radius * rng.uniform(0, 0.9))
    return mask


@given(
    seed=st.integers(0, 2**16),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    density=st.sampled_from((0.0, 0.02, 0.3, 0.7)),
)
@settings(deadline=None, max_examples=60)
def test_outlines_redraw_the_mask(seed: int, height: int, width: int, density: float) -> None:
    mask = blobs(seed, height, width, density)
    drawn = np.zeros_like(mask)
    for polygon in masks.outlines(mask):
        assert len(polygon) >= 3
        drawn |= masks.draw_outline(polygon, mask.shape)
    np.testing.assert_array_equal(drawn, mask)


@given(seed=st.integers(0, 2**16), other=st.integers(0, 2**16))
@settings(deadline=None, max_examples=30)
def test_run_lengths_agree_with_plain_counting(seed: int, other: int) -> None:
    first, second = blobs(seed, 17, 23, 0.1), blobs(other, 17, 23, 0.1)
    a, b = masks.encode(first), masks.encode(second)
    np.testing.assert_array_equal(masks.decode(a), first)
    assert masks.area(a) == first.sum()
    np.testing.assert_array_equal(masks.union([a, b], (17, 23)), first | second)


def test_empty_masks() -> None:
    empty = masks.encode(np.zeros((3, 4), dtype=bool))
    assert masks.area(empty) == 0
    assert masks.box(empty) == (0, 0, 0, 0)
    assert masks.outlines(np.zeros((3, 4), dtype=bool)) == []
    assert masks.union([], (3, 4)).shape == (3, 4)


def test_boxes_are_tight_and_exclusive() -> None:
    mask = np.zeros((6, 8), dtype=bool)
    mask[2:5, 1:4] = True
    assert masks.box(masks.encode(mask)) == (1, 2, 3, 3)
    np.testing.assert_array_equal(
        masks.boxes(np.stack([mask, np.zeros_like(mask)])), [[1, 2, 4, 5], [0, 0, 0, 0]]
    )


def test_outline_of_a_square_is_its_four_corner_pixels() -> None:
    mask = np.zeros((6, 8), dtype=bool)
    mask[1:4, 2:7] = True
    assert masks.outlines(mask) == [[(2, 1), (6, 1), (6, 3), (2, 3)]]


def test_a_single_pixel_still_has_three_points() -> None:
    mask = np.zeros((3, 3), dtype=bool)
    mask[1, 2] = True
    assert masks.outlines(mask) == [[(2, 1), (2, 1), (2, 1)]]


def test_coco_polygons_are_pixel_corners_and_short_ones_are_ignored() -> None:
    square = [[2, 1, 6, 1, 6, 4, 2, 4], [0, 0, 1, 1]]
    expected = np.zeros((6, 8), dtype=bool)
    expected[1:4, 2:6] = True
    np.testing.assert_array_equal(masks.decode(masks.from_segmentation(square, (6, 8))), expected)
    assert masks.area(masks.from_segmentation([[0, 0, 5, 5]], (6, 8))) == 0


def test_both_run_length_forms_read_the_same() -> None:
    mask = blobs(3, 9, 7, 0.2)
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat])))
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    plain = masks.from_segmentation({"size": [9, 7], "counts": counts}, (9, 7))
    assert plain == masks.from_segmentation(dict(masks.encode(mask)), (9, 7)) == masks.encode(mask)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        "text",
        [1, 2, 3],
        [[0, 0, 1, 0, 1, "x"]],
        [[0, 0, 1, 0, 1, float("nan")]],
        [[0, 0, 1, 0, 1, 1, 2]],
        {"size": [9, 9], "counts": [81]},
        {"size": [4, 4], "counts": [3, 99]},
        {"size": [4, 4], "counts": [-1, 17]},
        {"size": [4, 4]},
        {"size": [4, 4], "counts": "1"},
        {"size": [4, 4], "counts": "\ud800"},
        {"size": [4, 4], "counts": "`0\0"},
        [[0, 0, 1, 0, 1, 10**400]],
    ],
)
def test_damaged_segmentations_are_refused(segmentation: object) -> None:
    with pytest.raises(DataError):
        masks.from_segmentation(segmentation, (4, 4))


def test_run_lengths_that_overrun_are_refused() -> None:
    with pytest.raises(DataError, match="damaged"):
        masks.decode({"size": [2, 2], "counts": masks.encode(np.ones((9, 9), bool))["counts"]})


def test_runs_of_no_length_cannot_overflow_a_union() -> None:
    """pycocotools has room for one run a pixel, and writes on where there are more."""
    crowded = masks.from_segmentation({"size": [1, 2], "counts": "110O" + "0" * 100_000}, (1, 2))
    assert len(masks.run_lengths(crowded["counts"])) <= 3
    plain = masks.from_segmentation({"size": [1, 2], "counts": [1, 0, 0, 1]}, (1, 2))
    np.testing.assert_array_equal(masks.decode(plain), [[False, True]])
    many: Rle = {"size": [1, 1], "counts": "010O" + "0" * 100_000}
    assert masks.union([many, many], (1, 1)).tolist() == [[True]]


@pytest.mark.parametrize("counts", ["P", "oooooooo0", [4], b"4"])
def test_run_lengths_are_whole_numbers_in_compressed_text(counts: object) -> None:
    with pytest.raises(DataError):
        masks.decode(cast("Rle", {"size": [2, 2], "counts": counts}))


def test_run_lengths_that_fall_short_are_refused() -> None:
    """Otherwise the missing pixels would be whatever was in memory."""
    for counts in ("0", "", masks.encode(np.ones((3, 3), bool))["counts"]):
        with pytest.raises(DataError, match="damaged"):
            masks.decode({"size": [24, 32], "counts": counts})
