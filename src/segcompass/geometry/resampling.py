"""Pictures, masks and maps, resized and padded from one frame to another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from segcompass.geometry.coordinates import Frame, square_offsets

UInt8Array = npt.NDArray[np.uint8]


def to_frame(image: UInt8Array, frame: Frame) -> UInt8Array:
    """Scale an image into its frame (antialiased, bilinear); the padding is 0.

    Args:
        image: uint8 (height, width, 3), of the size the frame was fitted to.
        frame: from :meth:`Frame.fit`.

    Returns:
        uint8 (side, side, 3).

    Raises:
        ValueError: If the image is not uint8 RGB or not of the frame's size.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected uint8 (H, W, 3), got {image.dtype} {image.shape}")
    if image.shape[:2] != frame.image_hw:
        raise ValueError(
            f"image is {image.shape[:2]}, but the frame was fitted to {frame.image_hw}"
        )
    height, width = frame.scaled_hw
    scaled = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    out = np.zeros((frame.side, frame.side, 3), dtype=np.uint8)
    out[:height, :width] = np.asarray(scaled)
    return out


def shrink(image: UInt8Array, longest: int) -> UInt8Array:
    """Scale an image down until no side is longer than ``longest`` px; smaller ones stay.

    Args:
        image: uint8 (height, width, 3).
        longest: px.
    """
    if max(image.shape[:2]) <= longest:
        return image
    height, width = Frame.fit((image.shape[0], image.shape[1]), longest).scaled_hw
    scaled = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(scaled)


def stretch(image: UInt8Array, side: int) -> UInt8Array:
    """Scale an image (uint8, height × width × 3) to a square, giving up its proportions."""
    return to_frame(image, Frame.stretch((image.shape[0], image.shape[1]), side))


def pad_to_square(image: UInt8Array, fill: tuple[int, int, int]) -> UInt8Array:
    """Centre an image on a square of one colour, so that a centre crop loses nothing.

    Source: LLaVA-1.5's ``expand2square``.

    Args:
        image: uint8 (height, width, 3).
        fill: colour of the padding; LLaVA uses the image processor's mean.
    """
    height, width = image.shape[:2]
    top, left = square_offsets((height, width))
    side = max(height, width)
    out = np.empty((side, side, 3), dtype=np.uint8)
    out[:] = fill
    out[top : top + height, left : left + width] = image
    return out


def masks_to_image(
    logits: Float[Tensor, "*lead h w"], frame: Frame
) -> Float[Tensor, "*lead height width"]:
    """Bring maps of the whole square frame back to the image's own size.

    Source: segment-anything's ``postprocess_masks``: upsample to the frame, crop the padding,
    resize to the image; for a stretched image SAM 2's, which resizes once. Bilinear, on logits,
    so that thresholding comes last.

    Args:
        logits: maps over the square frame, at any resolution.
        frame: of the image the maps belong to.

    Returns:
        The maps at the image's height and width.

    Raises:
        ValueError: If the last two dimensions are not equal: such a map is not of the frame.
    """
    lead, (rows, columns) = logits.shape[:-2], logits.shape[-2:]
    if rows != columns:
        raise ValueError(f"maps of the square frame are square, got {rows}×{columns}")
    maps = logits.reshape(1, -1, rows, columns)
    if maps.shape[1] == 0:
        return logits.new_zeros((*lead, *frame.image_hw))
    if not frame.stretched:
        maps = F.interpolate(maps, (frame.side, frame.side), mode="bilinear", align_corners=False)
        maps = maps[..., : frame.scaled_hw[0], : frame.scaled_hw[1]]
    maps = F.interpolate(maps, frame.image_hw, mode="bilinear", align_corners=False)
    return maps.reshape(*lead, *frame.image_hw)


def masks_to_grid(
    masks: Bool[Tensor, "N height width"], frame: Frame, grid: int
) -> Float[Tensor, "N grid grid"]:
    """Area of each cell of the segmenter's grid that is covered by each mask.

    The exact area average, without drawing the mask at the frame's resolution; padding counts
    as uncovered. The same function makes targets for the heatmaps and for the low-res masks.

    Args:
        masks: bool masks on the image.
        frame: of the image.
        grid: cells a side.

    Returns:
        Coverage in [0, 1].

    Raises:
        ValueError: If the masks are not of the frame's image size.
    """
    if tuple(masks.shape[-2:]) != frame.image_hw:
        raise ValueError(f"masks are {tuple(masks.shape[-2:])}, the image is {frame.image_hw}")
    rows = _overlaps(grid, frame.image_hw[0], frame.scaled_hw[0], frame.side).to(masks.device)
    columns = _overlaps(grid, frame.image_hw[1], frame.scaled_hw[1], frame.side).to(masks.device)
    return (rows @ masks.float() @ columns.T).clamp(0, 1)


def _overlaps(cells: int, pixels: int, scaled: int, side: int) -> Tensor:
    """(cells, pixels) share of each cell of the frame covered by each image pixel, one axis."""
    edges = torch.arange(pixels + 1, dtype=torch.float64) * (scaled / pixels * cells / side)
    cell = torch.arange(cells, dtype=torch.float64)[:, None]
    inside = (edges[None, :] - cell).clamp(0, 1)  # how much of the cell lies left of each edge
    return (inside[:, 1:] - inside[:, :-1]).float()


def padding_mask(
    frames: Sequence[Frame], grid: int, device: torch.device | None = None
) -> Bool[Tensor, "B grid grid"]:
    """Cells of a grid over the frame whose centre lies in the padding, never all of them.

    Args:
        frames: one for each image of the batch.
        grid: cells a side.
        device: of the result.
    """
    sides = torch.tensor([frame.side for frame in frames], dtype=torch.float32, device=device)
    scaled = torch.tensor([frame.scaled_hw for frame in frames], dtype=torch.float32, device=device)
    centres = (torch.arange(grid, device=device) + 0.5) / grid
    beyond = centres * sides.view(-1, 1, 1) > scaled.view(-1, 2, 1)  # (B, 2, grid): y, then x
    beyond[..., 0] = False  # however thin the image, some cell shows it
    return beyond[:, 0, :, None] | beyond[:, 1, None, :]
