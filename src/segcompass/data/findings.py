"""What a look through a data set brings to light: problems by sort, and counts by split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from segcompass.io import archives
from segcompass.io.errors import SegCompassError, UnsafeFileError
from segcompass.io.images import displayed_hw

SLACK = 1.0  # px; annotators' outlines end this far outside a picture
_THREADS = 8  # reading headers waits for the disk


class Sort(StrEnum):
    """Sorts of problems, the gravest first."""

    UNSAFE = "unsafe file"
    UNREADABLE = "unreadable file"
    ENCODING = "wrong encoding"
    ENTRY = "broken entry"
    DUPLICATE = "duplicate id"
    DANGLING = "unknown id"
    MISSING_IMAGE = "missing image"
    BROKEN_IMAGE = "broken image"
    SIZE = "wrong size"
    MASK = "broken mask"
    OFF_IMAGE = "mask off the image"
    EMPTY = "empty mask"


class Problem(NamedTuple):
    """One thing that is wrong."""

    sort: Sort
    file: str
    entry: str  # what it is in the file: "annotation 11"; empty for the whole file
    text: str  # what was found


class SplitCount(NamedTuple):
    """Size of a split."""

    split: str
    images: int
    samples: int  # sentences that can be asked
    published: int | None  # of the published set: sentences, or images for ReasonSeg


Note = Callable[[Problem], None]
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass
class Findings:
    """All that was found in a data set."""

    layout: str
    folder: Path
    splits: list[SplitCount] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Problems by sort, the gravest first."""
        found = Counter(problem.sort for problem in self.problems)
        return {sort.value: found[sort] for sort in Sort if found[sort]}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "layout": self.layout,
            "folder": str(self.folder),
            "splits": [split._asdict() for split in self.splits],
            "counts": self.counts,
            "problems": [problem._asdict() for problem in self.problems],
        }


def problem_of(error: SegCompassError, file: Path, entry: str = "") -> Problem:
    """A file that could not be read, as a problem."""
    sort = Sort.UNREADABLE
    if isinstance(error, UnsafeFileError):
        sort = Sort.UNSAFE
    elif isinstance(error.__cause__, UnicodeDecodeError):
        sort = Sort.ENCODING
    return Problem(sort, str(file), entry, str(error))


def image_problem(path: Path, entry: str, hw: tuple[int, int] | None = None) -> Problem | None:
    """What is wrong with a picture, of which header and end are read; ``hw`` as stated, in px."""
    try:
        height, width = displayed_hw(path)
    except UnsafeFileError as error:
        return Problem(Sort.UNSAFE, str(path), entry, str(error))
    except SegCompassError as error:
        sort = Sort.BROKEN_IMAGE if archives.is_file(path) else Sort.MISSING_IMAGE
        return Problem(sort, str(path), entry, str(error))
    if hw in (None, (height, width)):
        return None
    stated = f"is {width}×{height} px, stated are {hw[1]}×{hw[0]}"
    return Problem(Sort.SIZE, str(path), entry, stated)


def in_threads(look: Callable[[In], Out], of: Iterable[In]) -> Iterator[Out]:
    """``map`` for looks that wait for the disk; in order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(look, of)


def off_image(coordinates: Iterable[tuple[float, float]], hw: tuple[int, int]) -> str | None:
    """The first point that lies outside a picture by more than ``SLACK``, in words."""
    for x, y in coordinates:
        if not (-SLACK <= x <= hw[1] + SLACK and -SLACK <= y <= hw[0] + SLACK):
            return f"the point ({x:g}, {y:g}) lies outside the {hw[1]}×{hw[0]} px of the picture"
    return None
