"""The mark: an outline around the region, and nothing else changed."""

from __future__ import annotations

import numpy as np
import pytest

from segcompass.grounding.marking import OUTLINE, mark


def test_only_the_ring_around_the_region_changes() -> None:
    image = np.random.default_rng(0).integers(0, 200, (5, 7, 3), dtype=np.uint8)
    mask = np.zeros((5, 7), dtype=bool)
    mask[2, 2] = True
    marked = mark(image, mask)
    ring = {(y, x) for y in (1, 2, 3) for x in (1, 2, 3)} - {(2, 2)}
    changed = {(int(y), int(x)) for y, x in np.argwhere((marked != image).any(-1))}
    assert changed == ring
    assert (marked[1, 1] == OUTLINE).all()


def test_the_outline_grows_with_the_picture() -> None:
    image = np.zeros((40, 480, 3), dtype=np.uint8)  # 480 / 160 = 3 px
    mask = np.zeros((40, 480), dtype=bool)
    mask[20, 200] = True
    assert (mark(image, mask) == OUTLINE).all(-1).sum() == 7 * 7 - 1


def test_everything_and_nothing_marked() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    for all_or_none in (True, False):
        marked = mark(image, np.full((6, 6), all_or_none))
        assert (marked == image).all()
        assert marked is not image


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4\).*\(6, 6\)"):
        mark(np.zeros((6, 6, 3), dtype=np.uint8), np.zeros((4, 4), dtype=bool))
