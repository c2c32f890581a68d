"""Show a model which region of a picture is meant."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage

OUTLINE = (255, 0, 255)  # a colour that few things have
_SIDES_PER_PX = 160  # the outline is 1 px wide for every so many px of the longest side


def mark(image: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "H W"]) -> np.ndarray:
    """Outline a region, and leave all else as it is: what is asked may depend on all of it.

    The outline lies outside the region, so that none of its pixels is lost.

    Args:
        image: RGB.
        mask: the region, of the picture's size; an empty one marks nothing.

    Returns:
        uint8 (H, W, 3).

    Raises:
        ValueError: the sizes differ.
    """
    if mask.shape != image.shape[:2]:
        raise ValueError(f"a mask of {mask.shape} cannot mark a picture of {image.shape[:2]}")
    marked = image.copy()
    width = max(1, round(max(mask.shape) / _SIDES_PER_PX))
    around = ndimage.binary_dilation(mask, np.ones((3, 3), dtype=bool), iterations=width)
    marked[around & ~mask] = OUTLINE
    return marked
