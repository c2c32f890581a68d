"""Annotated pictures of other tools: COCO files, LabelMe folders, folders of pictures and masks.

Each reader gives pictures with their instances; ``importing`` asks the questions about them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from segcompass.data.instances import Instances, annotation_mask
from segcompass.data.json_files import load_json
from segcompass.data.refcoco import Broken
from segcompass.io import archives, masks
from segcompass.io.errors import DataError, ImageError
from segcompass.io.images import SUFFIXES, displayed_hw, load_image

CIRCLE_CORNERS = 72  # of the polygon that stands for a LabelMe circle
MASK_SUFFIX = "_mask"  # of a mask that lies beside its picture


class Instance(NamedTuple):
    """One annotated thing."""

    key: str  # tells it from the others in its picture
    name: str  # category or label
    segmentation: Any  # as in COCO: polygons in px, or run lengths


class Picture(NamedTuple):
    """A picture with all that is annotated in it."""

    path: Path
    name: str  # as the source calls it
    hw: tuple[int, int]
    instances: tuple[Instance, ...]


def read_coco(path: Path, images: Path | None, on_broken: Broken) -> Iterator[Picture]:
    """Pictures of a COCO file; crowds and annotations without a pixel are left out.

    Args:
        path: the JSON file.
        images: folder of the pictures; None looks beside the file.
        on_broken: is told of pictures that cannot be read; they are left out.

    Raises:
        DataError: the file is missing or damaged.
        UnsafeFileError: a picture's name leads out of the folder.
    """
    table = Instances(path, images=images)
    for image_id in table.images:
        try:
            found = table.image_path(image_id)
            hw = _same_hw(found, table.image_hw(image_id))
            things = [a for a in table.annotations_of(image_id) if not a.get("iscrowd")]
            seen = [thing for thing in things if masks.decode(table.rle(thing["id"])).any()]
            instances = tuple(_coco_instance(table, thing) for thing in seen)
            yield Picture(found, str(image_id), hw, instances)
        except (DataError, ImageError) as error:
            on_broken(f"image {image_id}", DataError(str(error)))


def _coco_instance(table: Instances, thing: dict[str, Any]) -> Instance:
    category = thing.get("category_id")
    known = not isinstance(category, list | dict)
    name = table.categories.get(category, "thing") if known else None
    return Instance(str(thing["id"]), _named(name), thing["segmentation"])


def _named(label: Any) -> str:
    """A thing's name, by which it is asked for; raises DataError where it has none."""
    text = str(label).strip() if isinstance(label, str | int) else ""
    if not text:
        raise DataError(f"a thing is called {label!r:.60}; give it a name")
    return text


def read_labelme(root: Path, on_broken: Broken) -> Iterator[Picture]:
    """Pictures of a LabelMe folder; shapes of one label and group are one instance.

    Polygons, rectangles and circles are read. Paths that lead out of the folder are not followed:
    the picture is then looked for beside its JSON, by its stem.
    """
    for path in sorted(root.rglob("*.json")):
        try:
            yield _labelme_picture(root, path)
        except (DataError, ImageError) as error:
            on_broken(str(path.relative_to(root)), DataError(str(error)))


def _labelme_picture(root: Path, path: Path) -> Picture:
    content = load_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise DataError(f"{path} is no LabelMe file; it needs a list of shapes")
    found = _labelme_image(root, path, content.get("imagePath"))
    stated = (content.get("imageHeight"), content.get("imageWidth"))
    hw = displayed_hw(found) if None in stated else _same_hw(found, stated)
    groups: dict[tuple[str, Any], list[list[float]]] = {}
    for number, shape in enumerate(content["shapes"]):
        try:
            label, group = _named(shape["label"]), shape.get("group_id")
            alone = ("shape", number)
            groups.setdefault((label, alone if group is None else group), []).append(_ring(shape))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"{path}, shape {number} is damaged ({error!r})") from error
    instances = tuple(
        Instance(str(number), label, rings)
        for number, ((label, _), rings) in enumerate(groups.items())
    )
    for instance in instances:
        if not masks.area(annotation_mask(instance.segmentation, hw)):
            raise DataError(f"{path}: {instance.name!r} has no pixel in the picture")
    return Picture(found, Path(os.path.relpath(found, root)).as_posix(), hw, instances)


def _labelme_image(root: Path, path: Path, stated: Any) -> Path:
    if isinstance(stated, str) and stated:
        whole = path.parent.absolute() / Path(*PureWindowsPath(stated).parts)
        inside = Path(os.path.normpath(whole))
        if inside.is_relative_to(os.path.normpath(root.absolute())) and archives.is_file(inside):
            return inside
    beside = (path.with_suffix(suffix) for suffix in sorted(SUFFIXES))
    found = next((image for image in beside if image.is_file()), None)
    if found is None:
        raise DataError(f"the picture of {path} is missing; expected {stated!r:.60} or its stem")
    return found


def _ring(shape: dict[str, Any]) -> list[float]:
    """A LabelMe shape as a flat COCO polygon, in px."""
    points = [(float(x), float(y)) for x, y in shape["points"]]
    kind = shape.get("shape_type") or "polygon"
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    elif kind == "circle" and len(points) == 2:
        (x, y), radius = points[0], math.dist(*points)
        angles = (2 * math.pi * i / CIRCLE_CORNERS for i in range(CIRCLE_CORNERS))
        points = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
    elif kind not in ("polygon", "rectangle"):
        raise ValueError(f"a {kind} has no area; expected polygon, rectangle or circle")
    if len(points) < 3:
        raise ValueError(f"{len(points)} points enclose nothing")
    return [value for point in points for value in point]


def read_masks(root: Path, on_broken: Broken) -> Iterator[Picture]:
    """Pictures with masks: brighter than half of its brightest pixel is inside.

    Either ``images/NAME.jpg`` with ``masks/NAME.png``, or with ``masks/NAME/*.png`` for several
    things; or ``NAME.jpg`` and ``NAME_mask.png`` in one folder. File names say what the things are:
    the mask's in a folder of masks, else the picture's.
    """
    apart = (root / "images").is_dir() and (root / "masks").is_dir()
    for path in _pictures(root / "images" if apart else root):
        if not apart and path.stem.endswith(MASK_SUFFIX):
            continue
        try:
            hw = displayed_hw(path)
            found = _masks_of(root, path) if apart else _beside(path)
            instances = tuple(Instance(m.stem, name, _read_mask(m, hw)) for m, name in found)
            yield Picture(path, path.name, hw, instances)
        except (DataError, ImageError) as error:
            on_broken(path.name, DataError(str(error)))


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())


def _masks_of(root: Path, picture: Path) -> list[tuple[Path, str]]:
    """Masks of a picture and what they show."""
    folder = root / "masks" / picture.stem
    if folder.is_dir():
        return [(mask, _words(mask.stem)) for mask in _pictures(folder)]
    found = [m for m in _pictures(folder.parent) if m.stem == picture.stem]
    if not found:
        raise DataError(f"{picture} has no mask; expected {folder}.png or a folder of that name")
    return [(mask, _words(picture.stem)) for mask in found]


def _beside(picture: Path) -> list[tuple[Path, str]]:
    mask = picture.with_name(f"{picture.stem}{MASK_SUFFIX}.png")
    if not mask.is_file():
        raise DataError(f"{picture} has no mask; expected {mask.name} beside it")
    return [(mask, _words(picture.stem))]


def _words(stem: str) -> str:
    """ "the-red_mug_01" -> "the red mug"."""
    words = stem.replace("_", " ").replace("-", " ").split()
    return " ".join(word for word in words if not word.isdigit()) or stem


def _read_mask(path: Path, hw: tuple[int, int]) -> Any:
    grey = load_image(path).max(axis=-1)
    if grey.shape != hw:
        raise DataError(
            f"{path} is {grey.shape[1]}×{grey.shape[0]} px, its picture {hw[1]}×{hw[0]}"
        )
    if not grey.any():
        raise DataError(f"{path} is empty; ask for what is not there by a table of instructions")
    return masks.encode(np.asarray(grey > grey.max() / 2))


def _same_hw(path: Path, stated: tuple[Any, Any]) -> tuple[int, int]:
    height, width = displayed_hw(path)
    if (height, width) != stated:
        raise DataError(
            f"{path} is {width}×{height} px, its annotations say {stated[1]}×{stated[0]}"
        )
    return height, width
