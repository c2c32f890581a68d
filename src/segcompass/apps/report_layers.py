"""The report's pictures as small data URIs: the photograph, and one layer per mask and heatmap."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

from segcompass.apps.pages import data_uri
from segcompass.io.outputs import mask_outline, overlay, slot_colour
from segcompass.io.sheets import spotlight
from segcompass.types import Prediction, given

PICTURE_SIDE = 1024  # px, longest side of the photograph
MASK_SIDE = 768  # px; small masks are enlarged to it so that their outline is smooth
HEAT_SIDE = 128  # px; a heatmap comes from a grid of at most 64
THUMBNAIL_SIDE = 120  # px
CANDIDATE_SIDE = 320  # px


def picture(prediction: Prediction) -> str:
    """The photograph, no larger than it is shown."""
    image = Image.fromarray(prediction.image_rgb)
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    return data_uri(image, "WEBP", quality=88)


def thumbnail(prediction: Prediction) -> str:
    """A small square cut of the photograph with its masks."""
    image = Image.fromarray(overlay(prediction))
    side = min(image.size)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, upper, left + side, upper + side))
    return data_uri(square.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE)), "WEBP", quality=80)


def candidate(prediction: Prediction, mask: np.ndarray) -> str:
    """The photograph, small and pale but for a mask that was weighed."""
    image = Image.fromarray(spotlight(prediction.image_rgb, mask[None]))
    image.thumbnail((CANDIDATE_SIDE, CANDIDATE_SIDE), Image.Resampling.LANCZOS)
    return data_uri(image, "WEBP", quality=80)


def mask_layer(prediction: Prediction, slot: int) -> str:
    """One mask: a tint, an outline, and a pale halo that parts it from any background."""
    mask = prediction.slot_masks[slot]
    scale = MASK_SIDE / max(mask.shape)
    size = (max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale)))
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BICUBIC)
    smooth = ndimage.gaussian_filter(np.asarray(grey, dtype=np.float32), 0.8 * max(scale, 1)) > 127
    halo = np.asarray(ndimage.binary_dilation(smooth, iterations=3)) & ~smooth
    pixels = smooth.astype(np.uint8) + mask_outline(smooth, 4) + 3 * halo.astype(np.uint8)
    colour = slot_colour(slot)
    image = Image.frombytes("P", size, pixels.astype(np.uint8).tobytes())
    image.putpalette([0, 0, 0, *colour, *colour, 255, 255, 255])
    return data_uri(image, "PNG", transparency=bytes((0, 92, 255, 215)), optimize=True)


def heat_layer(prediction: Prediction, slot: int) -> str:
    """One heatmap in the slot's own colours: clear at 0, the slot's colour, glowing at 1."""
    heatmaps = given(prediction.slot_heatmaps, "heatmaps")
    heat = Image.fromarray(heatmaps[slot].astype(np.float32))
    heat.thumbnail((HEAT_SIDE, HEAT_SIDE), Image.Resampling.BILINEAR)
    values = np.clip(np.asarray(heat), 0, 1)[..., None]
    colour = np.array(slot_colour(slot), dtype=np.float32)
    glow = np.array((255, 244, 214), dtype=np.float32)
    rgb = colour + (glow - colour) * np.clip(2 * values - 1, 0, 1) ** 1.5 * 0.7
    rgba = np.concatenate([rgb, 235 * values**0.8], axis=-1)
    return data_uri(Image.fromarray(np.rint(rgba).astype(np.uint8)), "WEBP", quality=80)
