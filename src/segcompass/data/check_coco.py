"""Look through a data set in the RefCOCO or gRefCOCO layout: every table, mask and picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segcompass.data.findings import (
    Note,
    Problem,
    Sort,
    SplitCount,
    image_problem,
    in_threads,
    off_image,
    problem_of,
)
from segcompass.data.instances import FILE, Instances, annotation_mask
from segcompass.data.json_files import load_json
from segcompass.data.published import published_sentences
from segcompass.data.refcoco import AUTHORS, NO_TARGET, load_references
from segcompass.io import masks
from segcompass.io.errors import DataError, SegCompassError

TABLES = {"images": ("id",), "annotations": ("id", "image_id")}  # and what entries must have


@dataclass(frozen=True)
class _Bad:
    """What references must not ask for, by id."""

    images: set[int] = field(default_factory=set)  # missing, broken or of another size
    masks: set[int] = field(default_factory=set)  # cannot be read
    empty: set[int] = field(default_factory=set)  # without a pixel


def check_coco(
    root: Path, pattern: str, note: Note, moved: Callable[[int, int], None]
) -> list[SplitCount]:
    """Find everything that is wrong with ``instances.json``, the references and the pictures.

    Args:
        root: the folder that holds them.
        pattern: of the reference files, ``refcoco.REFCOCO`` or ``refcoco.GREFCOCO``.
        note: is told of every problem.
        moved: is told how many of how many pictures have been looked at.

    Returns:
        The splits of every author's references, of what can be read.
    """
    table, bad = _load_tables(root, note), _Bad()
    if table is not None:
        _check_pictures(table, bad, note, moved)
        _check_masks(table, bad, note)
    counts: list[SplitCount] = []
    there = [author for author in AUTHORS if (root / pattern.format(author)).is_file()]
    for author in there:
        path = root / pattern.format(author)
        try:
            references = load_references(path)
        except SegCompassError as error:
            note(problem_of(error, path))
            continue
        if table is None:
            continue  # without tables every id would be unknown
        prefix = f"{author}:" if len(there) > 1 else ""
        for split, images, samples in _References(path, table, bad, note).check(references):
            published = published_sentences(root, author, split)
            counts.append(SplitCount(prefix + split, images, samples, published))
    return counts


def _load_tables(root: Path, note: Note) -> Instances | None:
    """The tables without the entries that have no id, or another's."""
    path = root / FILE
    try:
        tables = load_json(path)
        if not isinstance(tables, dict):
            raise DataError(f"{path} is no COCO file; it needs images and annotations")
        kept = {name: list(_entries(path, name, tables.get(name), note)) for name in TABLES}
        return Instances(path, tables | kept)
    except SegCompassError as error:
        note(problem_of(error, path))
        return None


def _entries(path: Path, name: str, rows: Any, note: Note) -> Iterator[dict[str, Any]]:
    if not isinstance(rows, list):
        raise DataError(f"{path} has no list {name!r}; a COCO file needs images and annotations")
    kind, seen = name.removesuffix("s"), set[int]()
    for number, row in enumerate(rows):
        whole = isinstance(row, dict) and all(isinstance(row.get(k), int) for k in TABLES[name])
        if not whole:
            lacks = f"needs whole numbers {' and '.join(TABLES[name])}, found {row!r:.80}"
            note(Problem(Sort.ENTRY, str(path), f"{name}[{number}]", lacks))
        elif row["id"] in seen:
            twice = "the id occurs more than once; the first entry is looked at"
            note(Problem(Sort.DUPLICATE, str(path), f"{kind} {row['id']}", twice))
        else:
            seen.add(row["id"])
            yield row


def _check_pictures(
    table: Instances, bad: _Bad, note: Note, moved: Callable[[int, int], None]
) -> None:
    def look(image_id: int) -> Problem | None:
        entry = f"image {image_id}"
        try:
            hw = table.image_hw(image_id)
        except DataError as error:
            return Problem(Sort.ENTRY, str(table.path), entry, str(error))
        try:
            return image_problem(table.image_path(image_id), entry, hw)
        except DataError as error:
            return Problem(Sort.MISSING_IMAGE, str(table.path), entry, str(error))
        except SegCompassError as error:
            return problem_of(error, table.path, entry)

    looks = zip(table.images, in_threads(look, table.images), strict=True)
    for done, (image_id, problem) in enumerate(looks, start=1):
        moved(done, len(table.images))
        if problem is not None:
            bad.images.add(image_id)
            note(problem)


def _check_masks(table: Instances, bad: _Bad, note: Note) -> None:
    """Look at all masks; those without a pixel, which published sets hold, are not noted here."""
    for ann_id, item in table.annotations.items():
        if item.get("iscrowd"):
            continue  # never read
        entry = f"annotation {ann_id}"
        if item["image_id"] not in table.images:
            unknown = f"belongs to image {item['image_id']}, which is not in the table"
            note(Problem(Sort.DANGLING, str(table.path), entry, unknown))
            continue
        try:
            hw = table.image_hw(item["image_id"])
        except DataError:
            continue  # noted with the picture
        try:
            segmentation = item.get("segmentation")
            rle = annotation_mask(segmentation, hw)
        except DataError as error:
            bad.masks.add(ann_id)
            note(Problem(Sort.MASK, str(table.path), entry, str(error)))
            continue
        outside = off_image(_points(segmentation), hw)
        if outside is not None:
            note(Problem(Sort.OFF_IMAGE, str(table.path), entry, outside))
        if masks.area(rle) == 0:
            bad.empty.add(ann_id)


def _points(segmentation: Any) -> Iterator[tuple[float, float]]:
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if len(polygon) >= 6:  # shorter ones do not count
                yield from zip(map(float, polygon[::2]), map(float, polygon[1::2]), strict=True)


class _References:
    """One author's references, judged against the tables."""

    def __init__(self, path: Path, table: Instances, bad: _Bad, note: Note) -> None:
        self.path, self.table, self.bad, self.note = path, table, bad, note
        self.seen: set[tuple[str, Any]] = set()  # ids of references and sentences

    def check(self, references: list[dict[str, Any]]) -> Iterator[tuple[str, int, int]]:
        """Name, pictures and readable sentences of every split."""
        images: dict[str, set[int]] = {}
        samples: dict[str, int] = {}
        for number, reference in enumerate(references):
            split = str(reference.get("split"))
            images.setdefault(split, set())
            samples.setdefault(split, 0)
            name = reference.get("ref_id", f"number {number}")
            problems = list(self._problems(reference))
            for sort, text in problems:
                self.note(Problem(sort, str(self.path), f"reference {name}", text))
            if not problems and self._is_asked(reference):
                images[split].add(reference["image_id"])
                samples[split] += len(reference["sentences"])
        for split, shown in images.items():
            yield split, len(shown), samples[split]

    def _problems(self, reference: dict[str, Any]) -> Iterator[tuple[Sort, str]]:
        lacks = [k for k in ("ref_id", "ann_id", "image_id", "split") if k not in reference]
        if lacks:
            yield Sort.ENTRY, f"lacks {', '.join(lacks)}"
            return
        ids = [reference["image_id"], *_targets(reference)]
        if not all(isinstance(number, int) for number in ids):
            yield Sort.ENTRY, f"image_id and ann_id are whole numbers, found {ids!r:.60}"
            return
        if not self._is_new("reference", reference["ref_id"]):
            yield Sort.DUPLICATE, "the ref_id occurs more than once"
        if reference["image_id"] not in self.table.images:
            yield Sort.DANGLING, f"image {reference['image_id']} is not in {FILE}"
        yield from self._target_problems(reference)
        yield from self._sentence_problems(reference)

    def _target_problems(self, reference: dict[str, Any]) -> Iterator[tuple[Sort, str]]:
        for ann_id in _targets(reference):
            item = self.table.annotations.get(ann_id)
            if item is None:
                yield Sort.DANGLING, f"annotation {ann_id} is not in {FILE}"
            elif item["image_id"] != reference["image_id"]:
                other = f"annotation {ann_id} belongs to image {item['image_id']}"
                yield Sort.ENTRY, f"{other}, the reference to {reference['image_id']}"
            elif ann_id in self.bad.empty:
                yield Sort.EMPTY, f"annotation {ann_id} has no pixel in the picture"

    def _sentence_problems(self, reference: dict[str, Any]) -> Iterator[tuple[Sort, str]]:
        sentences = reference.get("sentences")
        if not isinstance(sentences, list) or not sentences:
            yield Sort.ENTRY, "has no sentences"
            return
        for sentence in sentences:
            if not isinstance(sentence, dict) or "sent_id" not in sentence:
                yield Sort.ENTRY, f"a sentence is {sentence!r:.60}; expected sent and sent_id"
                continue
            if not str(sentence.get("sent") or sentence.get("raw") or "").strip():
                yield Sort.ENTRY, f"sentence {sentence['sent_id']} is empty"
            if not self._is_new("sentence", (reference["ref_id"], sentence["sent_id"])):
                yield Sort.DUPLICATE, f"sentence {sentence['sent_id']} occurs more than once"

    def _is_asked(self, reference: dict[str, Any]) -> bool:
        """Whether picture and masks are whole, and the targets are not only crowds."""
        targets = _targets(reference)
        crowds = [a for a in targets if self.table.annotations[a].get("iscrowd")]
        whole = reference["image_id"] not in self.bad.images and not self.bad.masks & {*targets}
        return whole and (not targets or len(crowds) < len(targets))

    def _is_new(self, kind: str, name: Any) -> bool:
        key = (kind, repr(name))
        known = key in self.seen
        self.seen.add(key)
        return not known


def _targets(reference: dict[str, Any]) -> list[int]:
    named = reference["ann_id"]
    named = named if isinstance(named, list) else [named]
    return [ann_id for ann_id in named if ann_id != NO_TARGET]
