"""Bring data sets of other tools into our layout, gRefCOCO's: all of it or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from segcompass.data import foreign
from segcompass.data.findings import SplitCount
from segcompass.data.foreign import Instance, Picture
from segcompass.data.instances import FILE
from segcompass.data.instructions import Instruction, read_instructions
from segcompass.data.json_files import dump_json, load_json
from segcompass.data.refcoco import GREFCOCO, NO_TARGET, Broken
from segcompass.io import archives, masks
from segcompass.io.errors import DataError
from segcompass.io.links import link_or_copy

FORMS = ("coco", "labelme", "masks")
AUTHOR = "unc"  # whom the reader looks for first


class _Question(NamedTuple):
    text: str
    targets: tuple[Instance, ...]
    split: str


def import_dataset(
    source: Path,
    out: Path,
    *,
    on_broken: Broken,
    form: str | None = None,
    instructions: Path | None = None,
    images: Path | None = None,
    split: str = "train",
    link: bool = False,
) -> list[SplitCount]:
    """Convert a data set; nothing but ``out`` is written.

    Args:
        source: a COCO file, or a folder that holds one, a LabelMe folder, or pictures and masks.
        out: the folder to make.
        on_broken: is told of pictures and rows of ``instructions`` that cannot be used.
        form: one of ``FORMS``; None finds out.
        instructions: what is asked, see ``read_instructions``; None asks for every category or
            label of a picture, by its name.
        images: folder of a COCO file's pictures; None looks beside the file.
        split: of questions whose row names none.
        link: hard-link the pictures instead of copying them, where the file system can.

    Returns:
        What was written, by split.

    Raises:
        DataError: ``out`` exists, the source is none of the forms, or nothing can be used.
        UnsafeFileError: a picture's name leads out of the source.
    """
    if out.exists():
        raise DataError(f"{out} exists; choose a folder that does not")
    pictures = _pictures(source, form, images, on_broken)
    rows = None if instructions is None else read_instructions(instructions)
    asked = _ask(pictures, rows, split, on_broken)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        counts = _Writer(partial, link).write(asked)
        if not counts:
            raise DataError(f"nothing in {source} could be imported")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


def _pictures(
    source: Path, form: str | None, images: Path | None, on_broken: Broken
) -> Iterator[Picture]:
    if form not in (None, *FORMS):
        raise DataError(f"no form is called {form!r}; choose one of {', '.join(FORMS)}")
    coco = _find_coco(source) if form in (None, "coco") else None
    if coco is not None:
        return foreign.read_coco(coco, images, on_broken)
    if form == "coco" or not source.is_dir():
        raise DataError(f"{source} is no COCO file and holds none; it needs images and annotations")
    if form == "labelme" or (form is None and next(source.rglob("*.json"), None)):
        return foreign.read_labelme(source, on_broken)
    return foreign.read_masks(source, on_broken)


def _find_coco(source: Path) -> Path | None:
    """The COCO file that is meant; raises DataError where there are several."""
    if source.is_file():
        return source
    places = [*source.glob("*.json"), *source.glob("annotations/*.json")]
    found = [path for path in sorted(places) if _is_coco(path)]
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise DataError(f"{source} holds several COCO files: {names}. Give one of them")
    return found[0] if found else None


def _is_coco(path: Path) -> bool:
    try:
        content = load_json(path)
    except DataError:
        return False  # told of when it is read as a LabelMe file
    return isinstance(content, dict) and {"images", "annotations"} <= set(content)


def _ask(
    pictures: Iterator[Picture],
    rows: Sequence[Instruction] | None,
    split: str,
    on_broken: Broken,
) -> Iterator[tuple[Picture, list[_Question]]]:
    """Every picture with the questions about it."""
    if rows is None:
        for picture in pictures:
            yield picture, _by_name(picture, split)
        return
    waiting: dict[str, list[Instruction]] = {}
    for row in rows:
        waiting.setdefault(row.image, []).append(row)
    asked: dict[str, Path] = {}  # what rows call a picture -> the first of that name
    for picture in pictures:
        names = {picture.name, picture.path.name, picture.path.stem}
        for name in sorted(names & asked.keys()):
            both = f"{name!r} is {asked[name]} as well as {picture.path}"
            told = "rows of that name are about the first; call the other by its own"
            on_broken(picture.name, DataError(f"{both}; {told}"))
        asked |= dict.fromkeys(names & waiting.keys(), picture.path)
        about = sorted((row for name in names for row in waiting.pop(name, ())), key=_row)
        questions = []
        for row in about:
            try:
                questions.append(_Question(row.text, _targets(row, picture), row.split or split))
            except DataError as error:
                on_broken(f"row {row.row}", error)
        yield picture, questions
    for row in sorted((row for left in waiting.values() for row in left), key=_row):
        lost = DataError(f"no readable picture is called {row.image!r}")
        on_broken(f"row {row.row}", lost)


def _row(instruction: Instruction) -> int:
    return instruction.row


def _by_name(picture: Picture, split: str) -> list[_Question]:
    """One question for every name in a picture, about all that bear it."""
    named: dict[str, list[Instance]] = {}
    for instance in picture.instances:
        named.setdefault(instance.name, []).append(instance)
    return [_Question(name, tuple(instances), split) for name, instances in named.items()]


def _targets(row: Instruction, picture: Picture) -> tuple[Instance, ...]:
    if row.targets is None:
        return picture.instances
    known = {name for instance in picture.instances for name in (instance.key, instance.name)}
    if unknown := [target for target in row.targets if target not in known]:
        there = ", ".join(sorted(known)) or "nothing"
        raise DataError(f"{picture.path} has no {unknown[0]!r}; annotated there: {there:.200}")
    wanted = set(row.targets)
    return tuple(i for i in picture.instances if wanted & {i.key, i.name})


class _Writer:
    """Writes pictures and tables; ids count from 1."""

    def __init__(self, out: Path, link: bool) -> None:
        self.out, self.link = out, link
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.references: list[dict[str, Any]] = []
        self.categories: dict[str, int] = {}
        self.files: set[str] = set()

    def write(self, asked: Iterator[tuple[Picture, list[_Question]]]) -> list[SplitCount]:
        """Write all pictures that are asked about."""
        (self.out / "images").mkdir(parents=True)
        for picture, questions in asked:
            if questions:
                self._add(picture, questions)
        categories = [{"id": i, "name": name} for name, i in self.categories.items()]
        tables = {"images": self.images, "annotations": self.annotations, "categories": categories}
        dump_json(self.out / FILE, tables)
        dump_json(self.out / GREFCOCO.format(AUTHOR), self.references)
        shown: dict[str, list[int]] = {}
        for reference in self.references:
            shown.setdefault(reference["split"], []).append(reference["image_id"])
        return [SplitCount(name, len(set(ids)), len(ids), None) for name, ids in shown.items()]

    def _add(self, picture: Picture, questions: list[_Question]) -> None:
        image_id, file = len(self.images) + 1, self._place(picture.path)
        height, width = picture.hw
        image = {"id": image_id, "file_name": file, "height": height, "width": width}
        self.images.append(image)
        ids = {i.key: self._annotate(image_id, i, picture.hw) for i in picture.instances}
        for question in questions:
            ref_id = len(self.references) + 1
            words = {"raw": question.text, "sent": question.text, "tokens": question.text.split()}
            self.references.append(
                {
                    "ref_id": ref_id,
                    "ann_id": [ids[target.key] for target in question.targets] or [NO_TARGET],
                    "image_id": image_id,
                    "file_name": file,
                    "split": question.split,
                    "sent_ids": [ref_id],
                    "sentences": [words | {"sent_id": ref_id}],
                }
            )

    def _annotate(self, image_id: int, instance: Instance, hw: tuple[int, int]) -> int:
        rle = masks.from_segmentation(instance.segmentation, hw)
        category = self.categories.setdefault(instance.name, len(self.categories) + 1)
        entry = {
            "id": len(self.annotations) + 1,
            "image_id": image_id,
            "category_id": category,
            "segmentation": instance.segmentation,
            "area": masks.area(rle),
            "bbox": list(masks.box(rle)),
            "iscrowd": 0,
        }
        self.annotations.append(entry)
        return len(self.annotations)

    def _place(self, source: Path) -> str:
        """Put a picture into the folder; its name there."""
        name, number = source.name, 1
        while name.lower() in self.files:  # of another folder; some disks know no capitals
            number += 1
            name = f"{source.stem}-{number}{source.suffix}"
        self.files.add(name.lower())
        target = self.out / "images" / name
        if archives.in_archive(source):
            target.write_bytes(archives.read_bytes(source))
        else:
            (link_or_copy if self.link else shutil.copyfile)(source, target)
        return name
