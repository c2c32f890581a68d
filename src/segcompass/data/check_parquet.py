"""Look through a data set of Parquet files: every row and its picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from segcompass.data.findings import Note, Problem, Sort, SplitCount, image_problem, problem_of
from segcompass.data.parquet import read_parquet, split_files
from segcompass.io.errors import DataError, SegCompassError


def check_parquet(root: Path, note: Note, moved: Callable[[int, int], None]) -> list[SplitCount]:
    """Find everything that is wrong with the rows of every split.

    Args:
        root: the folder that holds the files.
        note: is told of every problem.
        moved: is told how many of how many pictures of a split have been looked at.

    Returns:
        The splits, of what can be read.
    """
    counts = []
    for split, files in split_files(root).items():

        def broken(name: str, error: DataError, folder: Path = files[0].parent) -> None:
            note(Problem(Sort.ENTRY, str(folder), name, str(error)))

        try:
            samples = read_parquet(root, split, on_broken=broken)
        except SegCompassError as error:
            note(problem_of(error, files[0]))
            continue
        whole = 0
        for done, sample in enumerate(samples, start=1):
            moved(done, len(samples))
            problem = image_problem(sample.image_path, sample.sample_id, sample.image_hw)
            if problem is None:
                whole += 1
            else:
                note(problem)
        counts.append(SplitCount(split, whole, whole, None))
    return counts
