"""RefCOCO, RefCOCO+, RefCOCOg (one target) and gRefCOCO (any number of targets, or none).

All of them are a list of references, each with its sentences, beside COCO's ``instances.json``.
The first three keep the list in a pickle, which is opened with a reader that builds nothing but
lists, dicts, text and numbers. Scenes add a side file with what only a drawn world can know.

A folder may hold several authors' splits of the references, as RefCOCOg's does. The first of unc,
umd and google that is there is read, or the one that the split names: ``google:val``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from segcompass.data.instances import FILE, SIDE_FILE, ImageRecord, Instances
from segcompass.data.json_files import load_json
from segcompass.data.plain_pickle import load_plain_pickle
from segcompass.data.published import published_sentences
from segcompass.io.errors import DataError
from segcompass.types import Sample

REFCOCO, GREFCOCO = "refs({}).p", "grefs({}).json"  # the references, by author
AUTHORS = ("unc", "umd", "google")  # whose split of the references, by preference
NO_TARGET = -1
Broken = Callable[[str, DataError], None]  # is told the name of an entry, and what is wrong with it
logger = logging.getLogger(__name__)


def read_refcoco(
    root: Path, split: str, *, limit: int | None = None, on_broken: Broken | None = None
) -> list[Sample]:
    """Read one split of RefCOCO, RefCOCO+ or RefCOCOg, one sample per sentence, in file order.

    Args:
        root: the folder that holds ``refs(unc).p`` (or ``umd``, ``google``) and ``instances.json``.
        split: as the references name it: train, val, testA, testB or test; after an author and a
            colon, that author's: "google:val".
        limit: keep only the first so many samples; None keeps all.
        on_broken: is told of references that cannot be read, and the others are; without it the
            first one is an error.

    Raises:
        DataError: a file is missing or damaged, or the split does not exist.
        UnsafeFileError: the pickle asks for anything but plain data.
    """
    author, name = find_references(root, REFCOCO, split)
    path = root / REFCOCO.format(author)
    samples = _read(root, path, name, limit, on_broken)
    published = published_sentences(root, author, name)
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
    author, name = find_references(root, GREFCOCO, split)
    return _read(root, root / GREFCOCO.format(author), name, limit, on_broken)


def read_images(root: Path, split: str) -> list[ImageRecord]:
    """Read the pictures of a split of scenes with all their things.

    Args:
        root: a folder of scenes in the gRefCOCO layout, side file included.
        split: train, val, testA or testB.

    Raises:
        DataError: a file is missing or damaged, or the split does not exist.
    """
    author, name = find_references(root, GREFCOCO, split)
    references = _of_split(root / GREFCOCO.format(author), name)
    table = Instances(root / FILE)
    if table.side is None:
        raise DataError(f"{root} has no {SIDE_FILE}: only scenes know all things of a picture")
    image_ids = dict.fromkeys(reference["image_id"] for reference in references)
    return [table.image_record(image_id) for image_id in image_ids]


def find_references(root: Path, pattern: str, split: str) -> tuple[str, str]:
    """Whose references are read, and the name of the split in them.

    Args:
        root: the folder that holds the references.
        pattern: ``REFCOCO`` or ``GREFCOCO``.
        split: name of a split, or author, colon and name.

    Raises:
        DataError: there are no references, or not that author's.
    """
    asked, _, name = split.rpartition(":")
    there = [author for author in AUTHORS if (root / pattern.format(author)).is_file()]
    if asked in there:
        return asked, name
    if asked:
        found = ", ".join(there) or "none"
        raise DataError(f"{root} has no {pattern.format(asked)}; authors there: {found}")
    if not there:
        names = ", ".join(pattern.format(author) for author in AUTHORS)
        raise DataError(f"{root} holds none of {names}; give the folder that holds the references")
    return there[0], name


def load_references(path: Path) -> list[dict[str, Any]]:
    """All references of a file; raises DataError or UnsafeFileError where it cannot be read."""
    references = load_plain_pickle(path) if path.suffix == ".p" else load_json(path)
    if not isinstance(references, list) or not all(isinstance(r, dict) for r in references):
        raise DataError(f"{path} is not a list of references; download or write it again")
    return references


def _read(
    root: Path, path: Path, split: str, limit: int | None, on_broken: Broken | None
) -> list[Sample]:
    references = _of_split(path, split)
    table = Instances(root / FILE)
    samples: list[Sample] = []
    for reference in references:
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


def _of_split(path: Path, split: str) -> list[dict[str, Any]]:
    references = load_references(path)
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
    image_path, image_hw = table.image_path(image_id), table.image_hw(image_id)
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
