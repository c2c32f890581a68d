"""Frames, and points and boxes in them; no pixel is touched here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Shaped

FloatArray = npt.NDArray[np.float32]
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
