"""ReasonSeg: one JSON beside each JPG, with the questions and the polygons that answer them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from segcompass.io import masks
from segcompass.io.errors import DataError
from segcompass.types import Sample

IMAGE_ENDINGS = (".jpg", ".jpeg", ".JPG", ".JPEG", ".png")
SPLITS = ("train", "val", "test", "testA", "testB")
PUBLISHED_IMAGES = {"train": 239, "val": 200, "test": 779}
TARGET, IGNORED = 1, 255
ORIENTATION = 0x0112  # EXIF tag; 5 to 8 turn the picture by a quarter
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
    folder = root / split
    if not folder.is_dir():
        found = ", ".join(s for s in SPLITS if (root / s).is_dir()) or "none"
        raise DataError(f"{folder} does not exist; splits in {root}: {found}")
    pairs = _pairs(folder, on_broken or _fail)
    if not pairs:
        raise DataError(f"{folder} holds no JSON files; expected one beside each JPG")
    published = PUBLISHED_IMAGES.get(split) if root.name == "ReasonSeg" else None
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
    dumped = json.dumps(note, ensure_ascii=False, separators=(",", ":"))
    path.write_text(dumped, encoding="utf-8", newline="\n")


def _pairs(folder: Path, on_broken: Callable[[str, DataError], None]) -> list[tuple[Path, Path]]:
    files = {path.name: path for path in folder.iterdir() if not path.name.startswith(".")}
    pairs: list[tuple[Path, Path]] = []
    for name in sorted(files):
        path = files[name]
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
    note = _load(json_path)
    texts = note.get("text")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise DataError(f'{json_path}: "text" must be a list of texts, found {texts!r:.60}')
    hw = _displayed_hw(image_path)
    try:
        canvas = _draw(note.get("shapes", []), hw)
    except (DataError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{json_path}: damaged shapes: {error}") from error
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


def _load(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")  # some published files are
    try:
        note = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no valid JSON ({error}); download or write it again") from error
    if not isinstance(note, dict):
        raise DataError(f"{path} must hold an object with text and shapes, found {note!r:.60}")
    return note


def _displayed_hw(path: Path) -> tuple[int, int]:
    """Size of a picture as displayed, without decoding it; polygons lie on that."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            width, height = image.size
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no readable JPEG or PNG: {error}") from error
    return (width, height) if turned else (height, width)


def _draw(shapes: list[dict[str, Any]], hw: tuple[int, int]) -> np.ndarray:
    """Target and ignored pixels: the largest shape first, so that smaller ones stay visible."""
    drawable = [(s["points"], s["label"].lower()) for s in shapes if s["label"].lower() != "flag"]
    sized = [(int(masks.draw_outline(p, hw).sum()), p, label) for p, label in drawable]
    canvas = Image.new("L", (hw[1], hw[0]))
    draw = ImageDraw.Draw(canvas)
    for _, points, label in sorted(sized, key=lambda s: -s[0]):
        masks.draw_into(draw, points, IGNORED if "ignore" in label else TARGET)
    return np.asarray(canvas)
