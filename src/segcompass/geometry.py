"""The sole owner of resizing, padding and coordinate changes.

Three frames exist besides the image itself. The *segmenter's frame* is a square of ``side`` px that
holds the image scaled so that its longest side fits, in the top left corner, with padding to the
right and below (SAM's convention), or stretched over the whole of it (SAM 2's). The *policy's
frame* is either the whole image (Qwen2.5-VL) or the image centred on a square (LLaVA-1.5). The
*canvas* is the policy's frame as a square of its own scale: coordinates in answers are px of it.

Points are (x, y) and boxes (x0, y0, x1, y1), in px, continuous: pixel i covers [i, i + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from PIL import Image
from torch import Tensor

FloatArray = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]
Fit = Literal["stretch", "square"]  # how the policy sees an image: whole, or centred on a square


@dataclass(frozen=True)
class Frame:
    """How one image lies in the segmenter's square frame: :meth:`fit` or :meth:`stretch` it."""

    image_hw: tuple[int, int]  # the image's own size
    scaled_hw: tuple[int, int]  # its size inside the frame; the rest is padding
    side: int  # the frame is side × side px
    stretched: bool = False  # over the whole frame, whatever its proportions

    @classmethod
    def fit(cls, hw: tuple[int, int], side: int) -> Frame:
        """Scale an image so that its longest side is ``side``, keeping its proportions.

        Source: segment-anything's ``ResizeLongestSide``, with at least one pixel a side.

        Args:
            hw: height and width of the image in px, both at least 1.
            side: side of the square frame in px, at least 1.

        Raises:
            ValueError: If a size is not positive.
        """
        height, width = _positive(hw, side)
        scale = side / max(height, width)
        scaled = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
        return cls(image_hw=(height, width), scaled_hw=scaled, side=side)

    @classmethod
    def stretch(cls, hw: tuple[int, int], side: int) -> Frame:
        """Scale an image to the whole frame, giving up its proportions; there is no padding.

        Source: SAM 2's preprocessing. Arguments and errors as of :meth:`fit`.
        """
        return cls(image_hw=_positive(hw, side), scaled_hw=(side, side), side=side, stretched=True)

    @property
    def scale_xy(self) -> tuple[float, float]:
        """Frame px per image px along x and y; unless stretched, they differ by rounding only."""
        return self.scaled_hw[1] / self.image_hw[1], self.scaled_hw[0] / self.image_hw[0]


def _positive(hw: tuple[int, int], side: int) -> tuple[int, int]:
    height, width = int(hw[0]), int(hw[1])
    if height < 1 or width < 1 or side < 1:
        raise ValueError(
            f"image size {height}×{width} and frame side {side} must all be at least 1 px"
        )
    return height, width


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


def _overlaps(cells: int, pixels: int, scaled: int, side: int) -> Tensor:
    """(cells, pixels) share of each cell of the frame covered by each image pixel, one axis."""
    edges = torch.arange(pixels + 1, dtype=torch.float64) * (scaled / pixels * cells / side)
    cell = torch.arange(cells, dtype=torch.float64)[:, None]
    inside = (edges[None, :] - cell).clamp(0, 1)  # how much of the cell lies left of each edge
    return (inside[:, 1:] - inside[:, :-1]).float()


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


def _scaled(xy: npt.ArrayLike, factors: tuple[float, float], width: int) -> npt.NDArray[Any]:
    values = np.asarray(xy)
    if values.shape[-1:] != (width,):
        raise ValueError(f"expected {width} coordinates in the last dimension, got {values.shape}")
    if not np.issubdtype(values.dtype, np.floating):
        values = values.astype(np.float32)
    scaled: npt.NDArray[Any] = values * np.asarray(factors * (width // 2), dtype=values.dtype)
    return scaled


def points_to_frame(points: Shaped[np.ndarray, "*n 2"], frame: Frame) -> Float[np.ndarray, "*n 2"]:
    """Points (x, y) on the image, in px of the frame."""
    return _scaled(points, frame.scale_xy, 2)


def points_to_image(points: Shaped[np.ndarray, "*n 2"], frame: Frame) -> Float[np.ndarray, "*n 2"]:
    """Points (x, y) in the frame, in px of the image; points in the padding fall outside it."""
    x, y = frame.scale_xy
    return _scaled(points, (1 / x, 1 / y), 2)


def boxes_to_frame(boxes: Shaped[np.ndarray, "*n 4"], frame: Frame) -> Float[np.ndarray, "*n 4"]:
    """Boxes (x0, y0, x1, y1) on the image, in px of the frame."""
    return _scaled(boxes, frame.scale_xy, 4)


def boxes_to_image(boxes: Shaped[np.ndarray, "*n 4"], frame: Frame) -> Float[np.ndarray, "*n 4"]:
    """Boxes (x0, y0, x1, y1) in the frame, in px of the image; not clipped to it."""
    x, y = frame.scale_xy
    return _scaled(boxes, (1 / x, 1 / y), 4)


def square_offsets(image_hw: tuple[int, int]) -> tuple[int, int]:
    """Rows above and columns left of an image that is centred on a square."""
    side = max(image_hw)
    return (side - image_hw[0]) // 2, (side - image_hw[1]) // 2


def _seen(image_hw: tuple[int, int], fit: Fit) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows above and columns left of the image in what the policy sees, and its size, in px."""
    if fit == "square":
        return square_offsets(image_hw), (max(image_hw), max(image_hw))
    if fit == "stretch":
        return (0, 0), image_hw
    raise ValueError(f"fit must be 'stretch' or 'square', got {fit!r}")


@dataclass(frozen=True)
class Canvas:
    """What coordinates written in an answer refer to: a square of ``side`` px with the picture.

    Source: Seg-Zero, whose pictures are stretched to 840 px a side. With ``fit="square"`` the
    picture is centred on a square first and keeps its proportions (:func:`pad_to_square`).
    Sizes of images are (height, width) in px.
    """

    side: int
    fit: Fit = "stretch"

    def points_to_canvas(
        self, points: Shaped[np.ndarray, "*n 2"], image_hw: tuple[int, int]
    ) -> Float[np.ndarray, "*n 2"]:
        """Points (x, y) on the image, in px of the canvas, not rounded."""
        return self._to_canvas(points, image_hw, 2)

    def points_to_image(
        self, points: Shaped[np.ndarray, "*n 2"], image_hw: tuple[int, int]
    ) -> Float[np.ndarray, "*n 2"]:
        """Points (x, y) on the canvas, in px of the image; points in the padding fall outside."""
        return self._to_image(points, image_hw, 2)

    def boxes_to_canvas(
        self, boxes: Shaped[np.ndarray, "*n 4"], image_hw: tuple[int, int]
    ) -> Float[np.ndarray, "*n 4"]:
        """Boxes (x0, y0, x1, y1) on the image, in px of the canvas, not rounded."""
        return self._to_canvas(boxes, image_hw, 4)

    def boxes_to_image(
        self, boxes: Shaped[np.ndarray, "*n 4"], image_hw: tuple[int, int]
    ) -> Float[np.ndarray, "*n 4"]:
        """Boxes (x0, y0, x1, y1) on the canvas, in px of the image and clipped to it."""
        height, width = image_hw
        return self._to_image(boxes, image_hw, 4).clip(0, (width, height) * 2)

    def _placed(
        self, image_hw: tuple[int, int]
    ) -> tuple[npt.NDArray[np.float64], tuple[float, float]]:
        """Columns and rows before the image, and canvas px per image px along x and y."""
        _positive(image_hw, self.side)
        (top, left), (rows, columns) = _seen(image_hw, self.fit)
        return np.array([left, top]), (self.side / columns, self.side / rows)

    def _to_canvas(
        self, xy: npt.ArrayLike, image_hw: tuple[int, int], width: int
    ) -> npt.NDArray[Any]:
        before, (x, y) = self._placed(image_hw)
        return _scaled(np.asarray(xy) + np.tile(before, width // 2), (x, y), width)

    def _to_image(
        self, xy: npt.ArrayLike, image_hw: tuple[int, int], width: int
    ) -> npt.NDArray[Any]:
        before, (x, y) = self._placed(image_hw)
        return _scaled(xy, (1 / x, 1 / y), width) - np.tile(before, width // 2)


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


def token_boxes(
    grid_hw: tuple[int, int],
    image_hw: tuple[int, int],
    *,
    fit: Fit = "stretch",
) -> FloatArray:
    """Where on the image each of the policy's image tokens looks.

    Args:
        grid_hw: rows and columns of image tokens.
        image_hw: size of the image in px.
        fit: ``stretch`` where the policy resizes the whole image (Qwen2.5-VL), ``square`` where
            the image is first centred on a square (LLaVA-1.5, see :func:`pad_to_square`).

    Returns:
        float32 (rows * columns, 4), x0 y0 x1 y1 in px of the image, in reading order, clipped to
        the image: a token that sees padding alone has a box without area.

    Raises:
        ValueError: If a size is not positive, or ``fit`` is unknown.
    """
    (rows, columns), (height, width) = grid_hw, image_hw
    if min(rows, columns, height, width) < 1:
        raise ValueError(f"token grid {grid_hw} and image size {image_hw} must be at least 1")
    (top, left), spans = _seen(image_hw, fit)
    ys = np.clip(np.linspace(0, spans[0], rows + 1) - top, 0, height)
    xs = np.clip(np.linspace(0, spans[1], columns + 1) - left, 0, width)
    y0, x0 = np.meshgrid(ys[:-1], xs[:-1], indexing="ij")
    y1, x1 = np.meshgrid(ys[1:], xs[1:], indexing="ij")
    return np.stack([x0, y0, x1, y1], axis=-1).reshape(-1, 4).astype(np.float32)
