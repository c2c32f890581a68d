"""Masks as files and records: run lengths (COCO), polygons (COCO and ReasonSeg), boxes.

Two polygon conventions live side by side. COCO's coordinates are pixel *corners*
(``from_segmentation``). ReasonSeg's are pixel *centres*, and its outline belongs to the shape
(``outlines`` writes them, ``draw_outline`` reads them).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw
from pycocotools import mask as coco
from scipy import ndimage

from segcompass.io.errors import DataError

if TYPE_CHECKING:
    from segcompass.types import Rle

Point = tuple[int, int]
EIGHT = np.ones((3, 3), dtype=bool)  # diagonal neighbours belong together
MAX_LETTERS = 7  # of a run length, which has 32 bits
POINT_LIMIT = 32767  # farther than any picture reaches, near enough for the rasteriser


def encode(mask: Bool[np.ndarray, "H W"]) -> Rle:
    """Run-length encode a mask.

    Raises:
        ValueError: the array has not two dimensions.
    """
    if mask.ndim != 2:
        raise ValueError(f"a mask has the shape (height, width), received {mask.shape}")
    coded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return _text(coded)


def decode(rle: Rle) -> Bool[np.ndarray, "H W"]:
    """The mask of a run-length encoding.

    Raises:
        DataError: the runs do not add up to the stated size.
    """
    decoded: np.ndarray = coco.decode(_bytes(rle))
    return decoded.astype(bool)


def run_lengths(counts: str) -> list[int]:
    """Lengths of the runs outside and inside a mask, in turn, from COCO's compressed text.

    Source: rleFrString of the COCO API: 5 bits a character, lowest first, the sixth says that more
    follow, the highest is the sign; from the fourth run on, differences to the run before the last.

    Raises:
        DataError: it is no such text, or a number in it does not end.
    """
    if not isinstance(counts, str) or not counts.isascii() or "\0" in counts:
        raise DataError(f"run lengths are COCO's compressed text, found {_short(counts)}")
    letters = np.frombuffer(counts.encode(), dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(letters & 32 == 0) + 1
    lengths = np.diff(ends, prepend=0)
    if lengths.sum() != len(letters) or lengths.max(initial=0) > MAX_LETTERS:
        raise DataError(f"run lengths hold a number that does not end: {_short(counts)}")
    if not len(letters):
        return []
    starts = ends - lengths
    shifts = 5 * (np.arange(len(letters)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((letters & 31) << shifts, starts)
    runs -= (letters[ends - 1] & 16 != 0) * (1 << 5 * lengths)
    for first in (1, 2):  # differences to the run before the last
        runs[first::2] = runs[first::2].cumsum()
    found: list[int] = runs.tolist()
    return found


def area(rle: Rle) -> int:
    """Number of pixels in the mask."""
    return int(coco.area(_bytes(rle)))


def union(rles: Sequence[Rle], hw: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """All pixels of any of the masks; an empty mask of size ``hw`` where there is none."""
    if not rles:
        return np.zeros(hw, dtype=bool)
    return decode(_text(coco.merge([_bytes(r) for r in rles])))


def box(rle: Rle) -> tuple[float, float, float, float]:
    """Tight box (x, y, width, height) in px, COCO's order; zeros for an empty mask."""
    x, y, width, height = (float(v) for v in coco.toBbox(_bytes(rle)))
    return x, y, width, height


def boxes(masks: Bool[np.ndarray, "N H W"]) -> Float[np.ndarray, "N 4"]:
    """Tight boxes (x0, y0, x1, y1) in px, right and lower edge exclusive; zeros where empty."""
    found = np.zeros((len(masks), 4), dtype=np.float32)
    for row, mask in zip(found, masks, strict=True):
        ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(ys):
            row[:] = xs[0], ys[0], xs[-1] + 1, ys[-1] + 1
    return found


def from_segmentation(segmentation: Any, hw: tuple[int, int]) -> Rle:
    """Read the ``segmentation`` of a COCO annotation: polygons, or run lengths of either form.

    Polygons of fewer than 6 coordinates are ignored; nothing left means an empty mask.

    Args:
        segmentation: list of flat polygons [x0, y0, x1, y1, …] in px, or {"size", "counts"}.
        hw: height and width of the image, in px.

    Raises:
        DataError: neither form, not numbers, or run lengths of another size than the image.
    """
    height, width = hw
    if isinstance(segmentation, dict):
        return _from_runs(segmentation, hw)
    if not isinstance(segmentation, list) or not all(isinstance(p, list) for p in segmentation):
        raise DataError(f"a segmentation is polygons or run lengths, found {_short(segmentation)}")
    try:
        polygons = [np.asarray(p, dtype=np.float64) for p in segmentation if len(p) >= 6]
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"a polygon is a flat list of numbers, found {_short(segmentation)}") from (
            error
        )
    if any(p.ndim != 1 or len(p) % 2 or not np.isfinite(p).all() for p in polygons):
        raise DataError(f"a polygon is x, y, x, y, … in pixels, found {_short(segmentation)}")
    if not polygons:
        return encode(np.zeros(hw, dtype=bool))
    flat = [np.clip(p, -POINT_LIMIT, POINT_LIMIT).tolist() for p in polygons]
    return _text(coco.merge(coco.frPyObjects(flat, height, width)))


def outlines(mask: Bool[np.ndarray, "H W"]) -> list[list[Point]]:
    """Polygons, one per hole-free piece, that redraw the mask exactly with ``draw_outline``.

    A component with a hole is cut in two along a row through the hole, as often as needed:
    ReasonSeg knows no holes, and overlapping bridges would depend on its reader's fill rule.

    Args:
        mask: the pixels to outline.

    Returns:
        Closed polygons of at least three (x, y) pixel centres each; the last point is not repeated.
    """
    if not mask.any():
        return []
    top, left = (int(np.argmax(mask.any(axis=axis))) for axis in (1, 0))
    found: list[list[Point]] = []
    labels, _ = ndimage.label(mask[top:, left:], structure=EIGHT)
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        x0, y0 = left + columns.start, top + rows.start
        polygons = _component_outlines(labels[rows, columns] == number)
        found.extend([(x + x0, y + y0) for x, y in polygon] for polygon in polygons)
    return found


def draw_outline(points: Iterable[Sequence[float]], hw: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """Fill a ReasonSeg polygon: pixel centres, fractions dropped, the outline included."""
    canvas = Image.new("L", (hw[1], hw[0]))
    draw_into(ImageDraw.Draw(canvas), points, 1)
    return np.asarray(canvas).astype(bool)


def draw_into(draw: ImageDraw.ImageDraw, points: Iterable[Sequence[float]], value: int) -> None:
    """Fill a ReasonSeg polygon on a canvas that may already hold others.

    Raises:
        DataError: a point is not a pair of finite numbers.
    """
    try:
        corners = np.asarray(list(points), dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"a polygon is a list of x, y pairs: {error}") from error
    if len(corners) == 0:
        return
    if corners.ndim != 2 or corners.shape[1] != 2 or not np.isfinite(corners).all():
        raise DataError("a polygon is a list of x, y pairs of finite numbers")
    whole = np.trunc(np.clip(corners, -POINT_LIMIT, POINT_LIMIT)).astype(int)
    path = [(int(x), int(y)) for x, y in whole]
    if len(path) > 2:
        draw.polygon(path, fill=value)
    draw.line([*path, path[0]], fill=value)  # the outline counts, and thin shapes are all outline


def _from_runs(segmentation: dict[str, Any], hw: tuple[int, int]) -> Rle:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or size != list(hw):
        raise DataError(f"run lengths of size {size} for an image of (height, width) {hw}")
    if isinstance(counts, str):
        return _text(_bytes({"size": [hw[0], hw[1]], "counts": counts}))
    whole = isinstance(counts, list) and all(isinstance(c, int) and c >= 0 for c in counts)
    if not whole or sum(counts or ()) != hw[0] * hw[1]:
        raise DataError(f"run lengths that do not add up to {hw[0]}x{hw[1]} pixels")
    return _text(_bytes(_text(coco.frPyObjects({"size": size, "counts": counts}, *hw))))


def _component_outlines(component: Bool[np.ndarray, "H W"]) -> list[list[Point]]:
    empty, n_empty = ndimage.label(~np.pad(component, 1))  # the first region is the outside
    if n_empty == 1:
        return [_trace(component)]
    hole_rows = np.flatnonzero((empty > 1).any(axis=1)) - 1
    cut = int(hole_rows[len(hole_rows) // 2]) + 1  # never the component's first or last row
    below = [[(x, y + cut) for x, y in polygon] for polygon in outlines(component[cut:])]
    return outlines(component[:cut]) + below


def _trace(component: Bool[np.ndarray, "H W"]) -> list[Point]:
    """Walk once around a component along its border pixels (Moore neighbours, clockwise).

    Only points where the direction changes are kept: the runs between them are horizontal,
    vertical or at 45 degrees, which every rasteriser draws through the same pixels.
    """
    padded = np.pad(component, 1)
    width = padded.shape[1]
    cells = padded.tobytes()
    steps = (1, width + 1, width, width - 1, -1, -width - 1, -width, -width + 1)
    start = position = cells.index(1)  # first in reading order: nothing to its west or north
    heading, first_move = 0, None
    corners: list[Point] = []
    while True:
        # look back to the last empty neighbour, then turn clockwise until the border goes on
        look = heading + (5 if heading % 2 else 6)
        move = next((m % 8 for m in range(look, look + 8) if cells[position + steps[m % 8]]), None)
        if move is None or (position == start and move == first_move):
            break
        if move != heading or first_move is None:
            corners.append((position % width - 1, position // width - 1))
        first_move = move if first_move is None else first_move
        position += steps[move]
        heading = move
    if not corners:
        corners = [(start % width - 1, start // width - 1)]
    return corners + corners[-1:] * (3 - len(corners))  # readers want three points


def _text(coded: dict[str, Any]) -> Rle:
    height, width = (int(v) for v in coded["size"])
    counts = coded["counts"]
    return {"size": [height, width], "counts": counts.decode("ascii")}


def _bytes(rle: Rle) -> dict[str, Any]:
    """A mask as pycocotools takes it, which would write past its memory where runs do not fit.

    Raises:
        DataError: the runs do not add up to the stated size.
    """
    (height, width), runs = rle["size"], run_lengths(rle["counts"])
    if min(runs, default=-1) < 0 or sum(runs) != height * width:
        raise DataError(
            f"a run-length encoding is damaged: its runs make {sum(runs)} pixels, "
            f"its size {width}x{height} wants {height * width}"
        )
    coded: dict[str, Any] = {"size": [height, width], "counts": rle["counts"].encode("ascii")}
    if 0 in runs[1:]:  # merging has room for one run a pixel
        coded = coco.encode(coco.decode(coded))
    return coded


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
