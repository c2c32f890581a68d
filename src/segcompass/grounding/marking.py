"""Show a model which region of a picture is meant."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage

OUTLINE = (255, 0, 255)  # a colour that few things have
_DIMMED = 0.4  # of the brightness outside the region
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_SIDES_PER_PX = 160  # the outline is 1 px wide for every so many px of the longest side


def mark(image: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "H W"]) -> np.ndarray:
    """Keep a region as it is, outline it, and dim and desaturate the rest.

    The outline lies outside the region, so that none of its pixels is lost.

    Args:
        image: RGB.
        mask: the region, of the picture's size; an empty one leaves everything dim.

    Returns:
        uint8 (H, W, 3).

    Raises:
        ValueError: the sizes differ.
    """
    if mask.shape != image.shape[:2]:
        raise ValueError(f"a mask of {mask.shape} cannot mark a picture of {image.shape[:2]}")
    grey = np.rint(image @ np.array(_LUMA) * _DIMMED).astype(np.uint8)
    marked = np.where(mask[..., None], image, grey[..., None])
    width = max(1, round(max(mask.shape) / _SIDES_PER_PX))
    around = ndimage.binary_dilation(mask, np.ones((3, 3), dtype=bool), iterations=width)
    marked[around & ~mask] = OUTLINE
    return marked
