"""Reasoning segmentation sets as the hub stores them: Parquet files with embedded pictures.

Files are called ``SPLIT-00000-of-00001.parquet`` (or ``SPLIT.parquet``), in the folder or in its
``data``. A row holds ``image`` (bytes), ``text``, ``mask`` (a picture, rows of booleans, or COCO's
run lengths) and perhaps ``dimension``, the kind of question. ReasonSeg-SGDR is assumed to be stored
like this; its four dimensions are discriminative, spatial, geometric and multi-step.

The picture of row 12 has the path ``FILE.parquet/image/12``, which ``io.images`` resolves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from segcompass.data.instances import annotation_mask
from segcompass.data.refcoco import Broken
from segcompass.io import masks, parquet
from segcompass.io.errors import DataError, ImageError
from segcompass.io.images import MAX_PIXELS, load_image
from segcompass.types import Rle, Sample

NEEDED = ("image", "text", "mask")
KIND = "dimension"
ALIASES = {"validation": "val"}  # the hub's names


def read_parquet(
    root: Path, split: str, *, limit: int | None = None, on_broken: Broken | None = None
) -> list[Sample]:
    """Read one split, one sample per row, in file order; of several texts the first one.

    Args:
        root: the folder that holds the files.
        split: as the files are called; "val" also means "validation".
        limit: keep only the first so many samples; None keeps all.
        on_broken: is told of rows that cannot be read, and the others are; without it the first
            one is an error.

    Raises:
        DataError: there is no such split, pyarrow is missing, or a file is damaged.
    """
    files = split_files(root)
    if split not in files:
        raise DataError(f"{root} has no split {split!r}; it holds: {', '.join(files) or 'none'}")
    samples: list[Sample] = []
    for path in files[split]:
        for row, group, place in _rows(path):
            if limit is not None and len(samples) >= limit:
                return samples
            try:
                samples.append(_sample(path, row, len(samples), group, place))
            except (DataError, ImageError) as error:
                odd = DataError(f"{path}, row {row}: {error}")
                if on_broken is None:
                    raise odd from error
                on_broken(f"{path.stem}-{row}", odd)
    return samples


def split_files(root: Path) -> dict[str, list[Path]]:
    """The files of every split, by the split's name."""
    found: dict[str, list[Path]] = {}
    for path in sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")]):
        name = path.stem.partition("-")[0]
        found.setdefault(ALIASES.get(name, name), []).append(path)
    return found


def _rows(path: Path) -> Iterator[tuple[int, Any, int]]:
    """Number of every row, the table of its row group, and its place there."""
    there = parquet.columns(path)
    if lacking := [name for name in NEEDED if name not in there]:
        raise DataError(f"{path} lacks {', '.join(lacking)}; it holds: {', '.join(there)}")
    names = [name for name in ("text", "mask", KIND) if name in there]
    row = 0
    for number, size in enumerate(parquet.group_sizes(path)):
        group = parquet.read_group(path, number, names)
        for place in range(size):
            yield row, group, place
            row += 1


def _sample(path: Path, row: int, index: int, group: Any, place: int) -> Sample:
    text = group.column("text")[place].as_py()
    text = text[0] if isinstance(text, list) and text else text
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"a text is needed, found {text!r:.60}")
    rle = _mask(group.column("mask")[place])
    height, width = rle["size"]
    kind = group.column(KIND)[place].as_py() if KIND in group.column_names else None
    return Sample(
        sample_id=f"{path.stem}-{row}",
        image_path=path / "image" / str(row),
        image_id=index,
        image_hw=(height, width),
        instruction=text.strip(),
        targets=(rle,) if masks.area(rle) else (),
        kind=None if kind is None else str(kind),
    )


def _mask(cell: Any) -> Rle:
    """A mask in any of the three forms; its size says how large the picture is."""
    if isinstance(cell, import_module("pyarrow").ListScalar):
        return masks.encode(_grid(cell.values))  # without making an object of every pixel
    value = cell.as_py()
    if isinstance(value, Mapping) and isinstance(value.get("size"), list):
        return annotation_mask(value, _hw(value["size"]))
    value = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(value, bytes):
        raise DataError("the mask is no picture, no rows of booleans and no run lengths")
    return masks.encode(np.asarray(load_image(value).max(axis=-1) > 0))


def _hw(size: list[Any]) -> tuple[int, int]:
    whole = len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
    if not whole or size[0] * size[1] > MAX_PIXELS:
        raise DataError(f"a mask of size {size!r:.60}; pictures have 1 to {MAX_PIXELS:,} pixels")
    return size[0], size[1]


def _grid(rows: Any) -> np.ndarray:
    try:
        lengths = rows.value_lengths().to_numpy(zero_copy_only=False)
        flat = np.asarray(rows.flatten().to_numpy(zero_copy_only=False))
        return flat.reshape(len(rows), _width(lengths)).astype(bool)
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"the rows of a mask are not of one length ({error})") from error


def _width(lengths: np.ndarray) -> int:
    found = np.unique(lengths)
    if len(found) != 1:
        raise ValueError(f"lengths {found.tolist()!r:.60}")
    return int(found[0])
