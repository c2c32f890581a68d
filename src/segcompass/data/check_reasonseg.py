"""Look through a data set in the ReasonSeg layout: every pair of picture and JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from segcompass.data.published import published_images
from segcompass.data.reasonseg import (
    FLAG,
    SPLITS,
    draw_shapes,
    load_note,
    pair_up,
    texts_of,
)
from segcompass.io import archives
from segcompass.io.errors import DataError, SegCompassError
from segcompass.io.images import displayed_hw


def check_reasonseg(root: Path, note: Note, moved: Callable[[int, int], None]) -> list[SplitCount]:
    """Find everything that is wrong with the pairs of every split.

    Args:
        root: the folder that holds the splits, as folders or archives.
        note: is told of every problem.
        moved: is told how many of how many pictures of a split have been looked at.

    Returns:
        The splits, of what can be read.
    """
    counts = []
    for split in SPLITS:
        folder = _find(root / split, note)
        if folder is None:
            continue

        def alone(name: str, error: DataError, folder: Path = folder) -> None:
            lacks_image = archives.is_file(folder / f"{name}.json")
            sort = Sort.MISSING_IMAGE if lacks_image else Sort.ENTRY
            note(Problem(sort, str(folder), name, str(error)))

        pairs = pair_up(folder, alone)
        images = samples = 0
        for done, (problems, texts) in enumerate(in_threads(_look, pairs), start=1):
            moved(done, len(pairs))
            for problem in problems:
                note(problem)
            if not problems:
                images += 1
                samples += texts if split == "train" else 1
        counts.append(SplitCount(split, images, samples, published_images(root, split)))
    return counts


def _find(folder: Path, note: Note) -> Path | None:
    try:
        return archives.find_folder(folder)
    except SegCompassError as error:
        note(problem_of(error, folder.with_name(folder.name + archives.SUFFIX)))
        return None


def _look(pair: tuple[Path, Path]) -> tuple[list[Problem], int]:
    """The problems of a pair, and how many instructions it holds."""
    image_path, json_path = pair
    problems: list[Problem] = []
    picture = image_problem(image_path, image_path.stem)
    if picture is not None:
        problems.append(picture)
    try:
        content = load_note(json_path)
    except SegCompassError as error:
        return [*problems, problem_of(error, json_path, json_path.stem)], 0
    texts = 0
    try:
        texts = len(texts_of(json_path, content))
        if not all(text.strip() for text in texts_of(json_path, content)):
            problems.append(Problem(Sort.ENTRY, str(json_path), json_path.stem, "a text is empty"))
    except DataError as error:
        problems.append(Problem(Sort.ENTRY, str(json_path), json_path.stem, str(error)))
    if picture is None:
        found = _shape_problem(json_path, content, displayed_hw(image_path))
        problems += [Problem(sort, str(json_path), json_path.stem, text) for sort, text in found]
    return problems, texts


def _shape_problem(
    path: Path, content: dict[str, Any], hw: tuple[int, int]
) -> Iterator[tuple[Sort, str]]:
    try:
        draw_shapes(path, content, hw)
    except DataError as error:
        yield Sort.MASK, str(error)
        return
    for shape in content.get("shapes", []):
        if shape["label"].lower() == FLAG:
            continue
        outside = off_image(((float(x), float(y)) for x, y in shape["points"]), hw)
        if outside is not None:
            yield Sort.OFF_IMAGE, outside
