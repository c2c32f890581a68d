"""ReasonSeg: one JSON beside each JPG, with the questions and the polygons that answer them.

A split is a folder, or an archive of its name, ``val.zip``, that is left unextracted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from segcompass.data.json_files import dump_json
from segcompass.data.published import published_images
from segcompass.io import archives, masks
from segcompass.io.errors import DataError, SegCompassError
from segcompass.io.images import displayed_hw
from segcompass.types import Sample

IMAGE_ENDINGS = (".jpg", ".jpeg", ".JPG", ".JPEG", ".png")
SPLITS = ("train", "val", "test", "testA", "testB")
TARGET, IGNORED = 1, 255
FLAG = "flag"  # label of a remark, which is not drawn
logger = logging.getLogger(__name__)


def read_reasonseg(
    root: Path,
    split: str,
    *,
    limit: int | None = None,
    on_broken: Callable[[str, DataError], None] | None = None,
) -> list[Sample]:
    """Read one split: one sample per picture, and in ``train`` one per text.

    Source: the ReasonSeg protocol; evaluation asks only the first text of a picture. All shapes
    together are one target; a picture without any is read as "nothing matches".

    Args:
        root: the folder that holds the folders train, val, test.
        split: name of one of them.
        limit: keep only the first so many samples; None keeps all.
        on_broken: is told of pairs of picture and JSON that cannot be read, and the others are;
            without it the first one is an error.

    Returns:
        Samples by file name. ``kind`` is "long" for a whole question, "short" for a phrase.

    Raises:
        DataError: a folder, picture or JSON file is missing or damaged.
    """
    folder = archives.find_folder(root / split)
    if folder is None:
        found = ", ".join(s for s in SPLITS if archives.find_folder(root / s)) or "none"
        raise DataError(f"{root / split} does not exist; splits in {root}: {found}")
    pairs = pair_up(folder, on_broken or _fail)
    if not pairs:
        raise DataError(f"{folder} holds no JSON files; expected one beside each JPG")
    published = published_images(root, split)
    if published not in (None, len(pairs)):
        logger.warning("%s: %d images, the published set has %d", folder, len(pairs), published)
    samples: list[Sample] = []
    for index, (image_path, json_path) in enumerate(pairs):
        if limit is not None and len(samples) >= limit:
            break
        try:
            samples += list(_samples(image_path, json_path, index, every_text=split == "train"))
        except DataError as error:
            (on_broken or _fail)(json_path.stem, error)
    return samples[:limit]


def _fail(_: str, error: DataError) -> None:
    raise error


def write_note(path: Path, text: str, polygons: Sequence[Sequence[masks.Point]]) -> None:
    """Write the JSON of one question; ``polygons`` as ``masks.outlines`` gives them."""
    note = {
        "text": [text],
        "is_sentence": text.endswith(("?", ".", "!")),
        "shapes": [
            {"label": "target", "shape_type": "polygon", "points": polygon} for polygon in polygons
        ],
    }
    dump_json(path, note)


def pair_up(folder: Path, on_broken: Callable[[str, DataError], None]) -> list[tuple[Path, Path]]:
    """Picture and JSON of every entry of a split; ``on_broken`` is told of either's being alone."""
    files = {name: folder / name for name in archives.list_files(folder)}
    pairs: list[tuple[Path, Path]] = []
    for path in files.values():
        if path.suffix in IMAGE_ENDINGS and f"{path.stem}.json" not in files:
            lacks = f"{path} has no {path.stem}.json beside it; add it, or take it away"
            on_broken(path.stem, DataError(lacks))
        if path.suffix != ".json":
            continue
        image = next((files[n] for e in IMAGE_ENDINGS if (n := path.stem + e) in files), None)
        if image is None:
            lacks = f"the picture of {path} is missing; expected {path.stem}.jpg beside it"
            on_broken(path.stem, DataError(lacks))
        else:
            pairs.append((image, path))
    return pairs


def _samples(
    image_path: Path, json_path: Path, index: int, *, every_text: bool
) -> Iterator[Sample]:
    note = load_note(json_path)
    texts = texts_of(json_path, note)
    hw = _hw(image_path)
    canvas = draw_shapes(json_path, note, hw)
    target, ignored = canvas == TARGET, canvas == IGNORED
    for number, text in enumerate(texts if every_text else texts[:1]):
        yield Sample(
            sample_id=f"{image_path.stem}-{number}",
            image_path=image_path,
            image_id=index,
            image_hw=hw,
            instruction=text.strip(),
            targets=(masks.encode(target),) if target.any() else (),
            ignore=masks.encode(ignored) if ignored.any() else None,
            kind="long" if note.get("is_sentence") else "short",
        )


def load_note(path: Path) -> dict[str, Any]:
    """The JSON beside a picture; raises DataError where it is damaged or oddly encoded."""
    try:
        text = _decode(path, archives.read_bytes(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the file") from error
    try:
        note = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no valid JSON ({error}); download or write it again") from error
    if not isinstance(note, dict):
        raise DataError(f"{path} must hold an object with text and shapes, found {note!r:.60}")
    return note


def texts_of(path: Path, note: dict[str, Any]) -> list[str]:
    """The instructions of a note; raises DataError where there are none."""
    texts = note.get("text")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise DataError(f'{path}: "text" must be a list of texts, found {texts!r:.60}')
    return texts


def _decode(path: Path, data: bytes) -> str:
    for encoding in ("utf-8-sig", "cp1252"):  # some published files are of the second
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            odd = error
    raise DataError(f"{path} is neither UTF-8 nor cp1252; convert it to UTF-8") from odd


def _hw(path: Path) -> tuple[int, int]:
    try:
        return displayed_hw(path)
    except SegCompassError as error:  # an unsafe picture is refused again when it is loaded
        raise DataError(f"{path} is no readable picture: {error}") from error


def draw_shapes(path: Path, note: dict[str, Any], hw: tuple[int, int]) -> np.ndarray:
    """Target and ignored pixels: the largest shape first, so that smaller ones stay visible.

    Raises:
        DataError: the note's shapes are damaged.
    """
    try:
        shapes = [(s["points"], s["label"].lower()) for s in note.get("shapes", [])]
        sized = [
            (int(masks.draw_outline(points, hw).sum()), points, label)
            for points, label in shapes
            if label != FLAG
        ]
        canvas = Image.new("L", (hw[1], hw[0]))
        draw = ImageDraw.Draw(canvas)
        for _, points, label in sorted(sized, key=lambda s: -s[0]):
            masks.draw_into(draw, points, IGNORED if "ignore" in label else TARGET)
    except (DataError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged shapes: {error}") from error
    return np.asarray(canvas)
