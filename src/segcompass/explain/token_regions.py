"""Which part of the picture each image token sees, and which tokens lie on an instance."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

INSTANCE = 0.25  # a token lies on what covers at least this part of its pixels


def pixel_tokens(
    boxes: Float[np.ndarray, "T 4"], image_hw: tuple[int, int]
) -> Int[np.ndarray, "height width"]:
    """The image token that sees each pixel, by the pixel's centre; -1 where none does.

    Args:
        boxes: x0 y0 x1 y1 of every image token, in px of the image, not overlapping.
        image_hw: height and width of the image.
    """
    found = np.full(image_hw, -1, dtype=np.int64)
    edges = np.ceil(boxes - 0.5).astype(int)  # the first pixel whose centre is at or past an edge
    for token, (x0, y0, x1, y1) in enumerate(edges):
        found[y0:y1, x0:x1] = token
    return found


def pixel_counts(
    boxes: Float[np.ndarray, "T 4"], masks: Bool[np.ndarray, "N height width"]
) -> Int[np.ndarray, "N T"]:
    """How many pixels of each mask each image token sees."""
    seen = pixel_tokens(boxes, (masks.shape[1], masks.shape[2])) + 1
    counts = [np.bincount(seen[mask], minlength=len(boxes) + 1)[1:] for mask in masks]
    return np.array(counts, dtype=np.int64).reshape(len(masks), len(boxes))


def shares(
    boxes: Float[np.ndarray, "T 4"], masks: Bool[np.ndarray, "N height width"]
) -> Float[np.ndarray, "N T"]:
    """Part of each token's pixels inside each mask, in [0, 1]; 0 for tokens that see nothing."""
    everything = np.ones((1, *masks.shape[1:]), dtype=bool)
    own = pixel_counts(boxes, everything)[0]
    return np.asarray(pixel_counts(boxes, masks) / np.maximum(own, 1))


def on_instance(
    boxes: Float[np.ndarray, "T 4"], target: Bool[np.ndarray, "height width"]
) -> Bool[np.ndarray, " T"]:
    """Which image tokens lie on the target; the others count as background."""
    return np.asarray(shares(boxes, target[None])[0] >= INSTANCE)
