"""RefCOCO, RefCOCO+, RefCOCOg (one target) and gRefCOCO (any number of targets, or none).

All of them are a list of references, each with its sentences, beside COCO's ``instances.json``.
The first three keep the list in a pickle, which is opened with a reader that builds nothing but
lists, dicts, text and numbers. Scenes add a side file with what only a drawn world can know.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from segcompass.io import masks
from segcompass.io.errors import DataError, UnsafeFileError
from segcompass.types import NamedObject, Rle, Sample

SIDE_FILE = "scenes.json"  # scenes only: question kinds, oracle thoughts, attributes of things
NO_TARGET = -1
PREFERRED = ("unc", "umd", "google")  # whose split of the references, where a folder holds several
IMAGE_FOLDERS = (
    "images",
    "images/train2014",
    "images/mscoco/images/train2014",
    "train2014",
    ".",
)
PUBLISHED_SENTENCES: dict[str, dict[str, int]] = {
    "refcoco": {"train": 120_624, "val": 10_834, "testA": 5_657, "testB": 5_095},
    "refcoco+": {"train": 120_191, "val": 10_758, "testA": 5_726, "testB": 4_889},
    "refcocog": {"train": 80_512, "val": 4_896, "test": 9_602},
}
Broken = Callable[[str, DataError], None]  # is told the name of an entry, and what is wrong with it
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageRecord:
    """One picture with everything in it, for pretraining on whole scenes."""

    image_path: Path
    image_id: int
    image_hw: tuple[int, int]
    objects: tuple[NamedObject, ...]  # in reading order
    masks: tuple[Rle, ...]  # visible pixels, one per object
    description: str  # the oracle's description of the whole picture


def read_refcoco(
    root: Path, split: str, *, limit: int | None = None, on_broken: Broken | None = None
) -> list[Sample]:
    """Read one split of RefCOCO, RefCOCO+ or RefCOCOg, one sample per sentence, in file order.

    Args:
        root: the folder that holds ``refs(unc).p`` (or ``umd``, ``google``) and ``instances.json``.
        split: as the references name it: train, val, testA, testB or test.
        limit: keep only the first so many samples; None keeps all.
        on_broken: is told of references that cannot be read, and the others are; without it the
            first one is an error.

    Raises:
        DataError: a file is missing or damaged, or the split does not exist.
        UnsafeFileError: the pickle asks for anything but plain data.
    """
    path = find_references(root, "refs({}).p")
    samples = _read(root, path, _load_pickle(path), split, limit, on_broken)
    published = PUBLISHED_SENTENCES.get(root.name.lower(), {}).get(split)
    real = bool(samples) and samples[0].image_path.name.startswith("COCO_")
    if limit is None and real and published not in (None, len(samples)):
        logger.warning(
            "%s %s: %d sentences, the published set has %d", root, split, len(samples), published
        )
    return samples


def read_grefcoco(
    root: Path, split: str, *, limit: int | None = None, on_broken: Broken | None = None
) -> list[Sample]:
    """Read one split of gRefCOCO, or of scenes in that layout, one sample per sentence.

    Args and errors as for ``read_refcoco``; the references are ``grefs(unc).json``. With the side
    file of scenes beside it, samples carry kind, thought and objects.
    """
    path = find_references(root, "grefs({}).json")
    return _read(root, path, load_json(path), split, limit, on_broken)


def read_images(root: Path, split: str) -> list[ImageRecord]:
    """Read the pictures of a split of scenes with all their things.

    Args:
        root: a folder of scenes in the gRefCOCO layout, side file included.
        split: train, val, testA or testB.

    Raises:
        DataError: a file is missing or damaged, or the split does not exist.
    """
    references = _of_split(path := find_references(root, "grefs({}).json"), load_json(path), split)
    table = Instances(root)
    if table.side is None:
        raise DataError(f"{root} has no {SIDE_FILE}: only scenes know all things of a picture")
    image_ids = dict.fromkeys(reference["image_id"] for reference in references)
    return [table.image_record(image_id) for image_id in image_ids]


def find_references(root: Path, pattern: str) -> Path:
    """The reference file of a folder, by preference unc, umd, google.

    Raises:
        DataError: there is none.
    """
    for author in PREFERRED:
        if (path := root / pattern.format(author)).is_file():
            return path
    names = ", ".join(pattern.format(author) for author in PREFERRED)
    raise DataError(f"{root} holds none of {names}; give the folder that holds the references")


def load_json(path: Path) -> Any:
    """Read a JSON file; raises DataError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; the layout needs it") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no valid JSON ({error}); download or write it again") from error


class Instances:
    """The tables of ``instances.json`` and the side file: pictures, masks and objects by id."""

    def __init__(self, root: Path) -> None:
        self.path = root / "instances.json"
        tables = load_json(self.path)
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
        self.folders = [b / f for b in bases for f in IMAGE_FOLDERS if (b / f).is_dir()]
        side = root / SIDE_FILE
        self.side: dict[str, dict[str, Any]] | None = load_json(side) if side.is_file() else None
        self._rles: dict[int, Rle] = {}
        self._places: dict[int, tuple[Path, tuple[int, int]]] = {}
        self._objects: dict[int, tuple[NamedObject, ...]] = {}

    def place(self, image_id: int) -> tuple[Path, tuple[int, int]]:
        """File and (height, width) of a picture; raises DataError where either is missing."""
        if image_id not in self._places:
            image = self.images.get(image_id, {})
            try:
                name, hw = image["file_name"], (int(image["height"]), int(image["width"]))
            except (TypeError, KeyError, ValueError) as error:
                raise DataError(f"{self.path} does not describe image {image_id}") from error
            self._places[image_id] = self._find(name), hw
        return self._places[image_id]

    def rle(self, ann_id: int) -> Rle:
        """The mask of an annotation; raises DataError where it is missing or damaged."""
        if ann_id not in self._rles:
            item = self.annotation(ann_id)
            try:
                self._rles[ann_id] = masks.from_segmentation(
                    item["segmentation"], self.place(item["image_id"])[1]
                )
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
        path, hw = self.place(image_id)
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
            if (path := folder / name).is_file():
                return path
        looked = ", ".join(str(folder) for folder in self.folders)
        raise DataError(f"image {name} is missing; looked in {looked}")


def _read(
    root: Path,
    path: Path,
    references: Any,
    split: str,
    limit: int | None,
    on_broken: Broken | None,
) -> list[Sample]:
    table = Instances(root)
    samples: list[Sample] = []
    for reference in _of_split(path, references, split):
        if limit is not None and len(samples) >= limit:
            break
        name = reference.get("ref_id")
        try:
            samples += list(_samples(reference, table))
        except DataError as error:
            if on_broken is None:
                raise
            on_broken(str(name), error)
        except (KeyError, TypeError) as error:
            odd = DataError(f"{path}, reference {name}: {error!r} is missing or odd")
            if on_broken is None:
                raise odd from error
            on_broken(str(name), odd)
    return samples[:limit]


def _of_split(path: Path, references: Any, split: str) -> list[dict[str, Any]]:
    if not isinstance(references, list) or not all(isinstance(r, dict) for r in references):
        raise DataError(f"{path} is not a list of references; download or write it again")
    chosen = [reference for reference in references if reference.get("split") == split]
    if not chosen:
        splits = ", ".join(sorted({str(r.get("split")) for r in references})) or "none"
        raise DataError(f"{path} has no split {split!r}; it holds: {splits}")
    return chosen


def _samples(reference: dict[str, Any], table: Instances) -> Iterator[Sample]:
    named = reference["ann_id"]
    named = list(named) if isinstance(named, list) else [named]
    target_ids = [a for a in named if a != NO_TARGET and not table.annotation(a).get("iscrowd")]
    if not target_ids and named != [NO_TARGET]:
        return  # only crowds: neither an instance to find nor "nothing matches"
    image_id, ref_id = reference["image_id"], reference["ref_id"]
    image_path, image_hw = table.place(image_id)
    side = table.side_entry("refs", ref_id)
    for sentence in reference["sentences"]:
        yield Sample(
            sample_id=f"{ref_id}-{sentence['sent_id']}",
            image_path=image_path,
            image_id=image_id,
            image_hw=image_hw,
            instruction=str(sentence.get("sent") or sentence["raw"]).strip(),
            targets=tuple(table.rle(a) for a in target_ids),
            target_ids=tuple(target_ids),
            kind=side.get("kind"),
            thought=side.get("thought"),
            objects=table.objects(image_id),
        )


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, text and numbers; refuses a pickle that names any class or function."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise UnsafeFileError(f"asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise UnsafeFileError(f"asks for the outside object {pid!r}")


def _load_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            # the published files were written by Python 2, whose text is bytes
            return _PlainUnpickler(file, encoding="utf-8", errors="replace").load()
    except UnsafeFileError as error:
        raise UnsafeFileError(
            f"{path} {error}; a list of references is plain data. "
            "It was not opened: get the file from where the data set is published"
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path} is a damaged pickle ({error}); download it again") from error
