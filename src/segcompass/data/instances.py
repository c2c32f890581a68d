"""COCO's ``instances.json``: pictures, masks and categories by id, and the side file of scenes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from segcompass.data.json_files import load_json
from segcompass.io import archives, masks
from segcompass.io.errors import DataError, UnsafeFileError
from segcompass.io.images import MAX_PIXELS
from segcompass.types import NamedObject, Rle

FILE = "instances.json"
SIDE_FILE = "scenes.json"  # scenes only: question kinds, oracle thoughts, attributes of things
IMAGE_FOLDERS = (
    "images",
    "images/train2014",
    "images/mscoco/images/train2014",
    "train2014",
    ".",
)


@dataclass(frozen=True)
class ImageRecord:
    """One picture with everything in it, for pretraining on whole scenes."""

    image_path: Path
    image_id: int
    image_hw: tuple[int, int]
    objects: tuple[NamedObject, ...]  # in reading order
    masks: tuple[Rle, ...]  # visible pixels, one per object
    description: str  # the oracle's description of the whole picture


def annotation_mask(segmentation: Any, hw: tuple[int, int]) -> Rle:
    """The mask of an annotation's ``segmentation``; raises DataError where it is damaged.

    The published sets hold polygons of two points, which do not count; half a point is damage.
    """
    if isinstance(segmentation, list):
        odd = next((p for p in segmentation if isinstance(p, list) and len(p) % 2), None)
        if odd is not None:
            raise DataError(f"a polygon of {len(odd)} numbers; they are x, y, x, y, … in pixels")
    return masks.from_segmentation(segmentation, hw)


class Instances:
    """The tables of ``instances.json`` and the side file: pictures, masks and objects by id.

    Args:
        path: the file; the side file lies beside it, the pictures in one of IMAGE_FOLDERS there or
            beside the file's folder.
        tables: its content where it has been read already.
        images: folder of the pictures where it is another.

    Raises:
        DataError: a file is missing or damaged.
    """

    def __init__(self, path: Path, tables: Any = None, images: Path | None = None) -> None:
        self.path, root = path, path.parent
        tables = load_json(path) if tables is None else tables
        self._members: dict[int, list[int]] = {}
        try:
            self.images: dict[int, dict[str, Any]] = {i["id"]: i for i in tables["images"]}
            self.annotations: dict[int, dict[str, Any]] = {}
            for item in tables["annotations"]:
                self.annotations[item["id"]] = item
                self._members.setdefault(item["image_id"], []).append(item["id"])
            self.categories = {item["id"]: item["name"] for item in tables.get("categories", ())}
        except (TypeError, KeyError) as error:
            raise DataError(
                f"{self.path} is no COCO file ({error!r}); it needs images and annotations"
            ) from error
        bases = (root, root.parent)  # the pictures are shared by neighbouring data sets
        usual = [b / f for b in bases for f in IMAGE_FOLDERS]
        places = [archives.find_folder(f) for f in ([images] if images else usual)]
        self.folders = [place for place in places if place is not None]
        side = root / SIDE_FILE
        self.side: dict[str, dict[str, Any]] | None = load_json(side) if side.is_file() else None
        self._rles: dict[int, Rle] = {}
        self._paths: dict[int, Path] = {}
        self._objects: dict[int, tuple[NamedObject, ...]] = {}

    def annotations_of(self, image_id: int) -> list[dict[str, Any]]:
        """The raw annotations of a picture, in the order of the file."""
        return [self.annotations[ann_id] for ann_id in self._members.get(image_id, ())]

    def image_hw(self, image_id: int) -> tuple[int, int]:
        """(height, width) of a picture as stated; raises DataError where it cannot be."""
        image = self.images.get(image_id, {})
        try:
            height, width = int(image["height"]), int(image["width"])
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise DataError(f"{self.path} does not describe image {image_id}") from error
        if min(height, width) < 1 or height * width > MAX_PIXELS:
            raise DataError(
                f"{self.path}: image {image_id} is said to be {width}x{height}; pictures have "
                f"from 1 to {MAX_PIXELS:,} pixels"
            )
        return height, width

    def image_path(self, image_id: int) -> Path:
        """File of a picture.

        Raises:
            DataError: the picture is not described, or its file is missing.
            UnsafeFileError: its name leads out of the folder.
        """
        if image_id not in self._paths:
            name = self.images.get(image_id, {}).get("file_name")
            if not isinstance(name, str):
                raise DataError(f"{self.path} does not describe image {image_id}")
            self._paths[image_id] = self._find(name)
        return self._paths[image_id]

    def rle(self, ann_id: int) -> Rle:
        """The mask of an annotation; raises DataError where it is missing or damaged."""
        if ann_id not in self._rles:
            item = self.annotation(ann_id)
            try:
                hw = self.image_hw(item["image_id"])
                self._rles[ann_id] = annotation_mask(item["segmentation"], hw)
            except (DataError, KeyError) as error:
                raise DataError(f"{self.path}, annotation {ann_id}: {error}") from error
        return self._rles[ann_id]

    def annotation(self, ann_id: int) -> dict[str, Any]:
        """The raw annotation; raises DataError where it is missing."""
        if ann_id not in self.annotations:
            raise DataError(f"{self.path} lacks annotation {ann_id}, which a reference points at")
        return self.annotations[ann_id]

    def objects(self, image_id: int) -> tuple[NamedObject, ...]:
        """Everything in a picture, in reading order; empty without a side file."""
        if self.side is not None and image_id not in self._objects:
            self._objects[image_id] = tuple(
                self._object(ann_id) for ann_id in self._members.get(image_id, ())
            )
        return self._objects.get(image_id, ())

    def image_record(self, image_id: int) -> ImageRecord:
        """A picture with everything in it; raises DataError where something is missing."""
        path, hw = self.image_path(image_id), self.image_hw(image_id)
        objects = self.objects(image_id)
        rles = tuple(self.rle(thing.ann_id) for thing in objects)
        description = self.side_entry("images", image_id).get("description", "")
        return ImageRecord(path, image_id, hw, objects, rles, description)

    def side_entry(self, table: str, key: int) -> dict[str, Any]:
        """What the side file says; empty where there is none, DataError where it has a hole."""
        if self.side is None:
            return {}
        try:
            entry: dict[str, Any] = self.side[table][str(key)]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{self.path.parent / SIDE_FILE} says nothing of {table} {key}; write it again"
            ) from error
        return entry

    def _object(self, ann_id: int) -> NamedObject:
        entry, item = self.side_entry("annotations", ann_id), self.annotation(ann_id)
        try:
            return NamedObject(ann_id, self.categories[item["category_id"]], **entry)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{self.path.parent / SIDE_FILE}, annotation {ann_id}: {error}"
            ) from error

    def _find(self, name: str) -> Path:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UnsafeFileError(f"{self.path} points outside its folder: {name!r}")
        for folder in self.folders:
            if archives.is_file(path := folder / name):
                return path
        looked = ", ".join(str(folder) for folder in self.folders)
        raise DataError(f"image {name} is missing; looked in {looked}")
