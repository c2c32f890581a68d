"""The mark: the region untouched, its outline around it, the rest grey and dim."""

from __future__ import annotations

import numpy as np
import pytest

from segcompass.grounding.marking import OUTLINE, mark


def test_a_marked_pixel_keeps_its_colour_and_the_rest_is_grey() -> None:
    image = np.full((5, 7, 3), (200, 100, 50), dtype=np.uint8)
    mask = np.zeros((5, 7), dtype=bool)
    mask[2, 2] = True
    marked = mark(image, mask)
    assert marked[2, 2].tolist() == [200, 100, 50]
    ring = {(y, x) for y in (1, 2, 3) for x in (1, 2, 3)} - {(2, 2)}
    found = {(int(y), int(x)) for y, x in np.argwhere((marked == OUTLINE).all(-1))}
    assert found == ring
    # luma 0.299*200 + 0.587*100 + 0.114*50 = 124.2; 0.4 of it, rounded
    assert marked[0, 6].tolist() == [50, 50, 50]


def test_the_outline_grows_with_the_picture() -> None:
    image = np.zeros((40, 480, 3), dtype=np.uint8)  # 480 / 160 = 3 px
    mask = np.zeros((40, 480), dtype=bool)
    mask[20, 200] = True
    assert (mark(image, mask) == OUTLINE).all(-1).sum() == 7 * 7 - 1


def test_everything_and_nothing_marked() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    assert (mark(image, np.ones((6, 6), dtype=bool)) == image).all()
    nothing = mark(image, np.zeros((6, 6), dtype=bool))
    assert (nothing.max(-1) == nothing.min(-1)).all() and nothing.max() <= 102


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4\).*\(6, 6\)"):
        mark(np.zeros((6, 6, 3), dtype=np.uint8), np.zeros((4, 4), dtype=bool))
