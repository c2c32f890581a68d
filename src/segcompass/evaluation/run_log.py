"""The folder of a run: which run it is, a row for every sample judged so far, and the figures.

Every process appends to a file of its own, ``samples.rankN.jsonl``; the main one merges them into
``samples.jsonl`` in the order of the data set, when a run begins and when it ends. So a run may be
killed at any moment and go on with any number of processes: a row counts once it ends in a newline,
and a sample that several files hold counts once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from segcompass.evaluation.scoring import PairScore
from segcompass.io.errors import DataError, SegCompassError
from segcompass.io.files import make_folder, read_object, write_whole
from segcompass.learning.engine.distributed import World

ROWS, SETTINGS, METRICS = "samples.jsonl", "run.json", "metrics.json"
PARTS = "samples.rank*.jsonl"
HEADLINE = ("model", "data", "split", "samples", "giou", "ciou", "n_acc", "t_acc", "intervals")


class RunLog:
    """Scores so far, in memory and, given a folder, in its rows.

    Args:
        out: folder of the run; None keeps nothing.
        settings: tell this run from any other, whose rows are not to be mixed in.
        order: ids of the samples, in the order of the data set.
        world: the processes that share the folder.

    Raises:
        DataError: the folder holds rows of another run, or something else.
    """

    def __init__(
        self, out: Path | None, settings: dict[str, Any], order: Sequence[str], world: World
    ) -> None:
        self.out, self.order, self.world = out, order, world
        self.scores: dict[str, PairScore] = {}
        if out is None:
            return
        problem = None
        if world.is_main:
            try:
                _claim(out, settings)
                self._merge()
            except SegCompassError as error:
                problem = error
        world.agree(problem)
        self.part = out / PARTS.replace("*", str(world.rank))
        if (out / ROWS).is_file():
            self.scores = {score.sample_id: score for score in read_scores(out / ROWS)}

    def add(self, judged: Iterable[tuple[PairScore, dict[str, Any]]]) -> None:
        """Keep a batch: all of its rows in one write."""
        lines = []
        for score, details in judged:
            self.scores[score.sample_id] = score
            lines.append(json.dumps(asdict(score) | details, ensure_ascii=False) + "\n")
        if self.out is not None and lines:
            with self.part.open("a", encoding="utf-8", errors="replace") as part:
                part.write("".join(lines))

    def close(self) -> None:
        """Bring all processes' scores together, and their rows into one file."""
        for scores in self.world.gather_objects(self.scores):  # by now all rows are written
            self.scores |= scores
        if self.world.is_main:
            self._merge()

    def _merge(self) -> None:
        if self.out is None:
            return
        parts = sorted(self.out.glob(PARTS))
        if not parts:
            return
        lines: dict[str, str] = {}
        for path in (self.out / ROWS, *parts):
            for number, line in _whole_lines(path):
                lines.setdefault(_parse(path, number, line)["sample_id"], line)
        known = [sample_id for sample_id in self.order if sample_id in lines]
        ordered = dict.fromkeys([*known, *lines])  # rows beyond a lower limit stay
        write_whole(self.out / ROWS, "".join(lines[sample_id] for sample_id in ordered))
        for part in parts:
            part.unlink()


def read_figures(run: Path) -> dict[str, Any]:
    """The figures of a run that came to its end; raises DataError where there are none."""
    figures = _facts(run / METRICS)
    if lacking := [name for name in HEADLINE if name not in figures]:
        raise DataError(f"{run / METRICS}: lacks {', '.join(lacking)}; it is none of eval --out")
    return figures


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a ``samples.jsonl``, one by one.

    Raises:
        DataError: naming the line that is no row of an evaluation.
    """
    for number, line in _whole_lines(path):
        yield _parse(path, number, line)


def read_scores(path: Path) -> Iterator[PairScore]:
    """What the rows of a ``samples.jsonl`` say of how the answers did.

    Raises:
        DataError: naming the line that is no row of an evaluation.
    """
    for number, line in _whole_lines(path):
        try:
            yield PairScore.from_row(_parse(path, number, line))
        except (ValueError, TypeError, KeyError) as error:
            raise _no_row(path, number, error) from error


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder this run's own, unless it is another's."""
    make_folder(out)
    described = out / SETTINGS
    if described.is_file():
        before = _facts(described)
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise DataError(
                f"{described}: its rows were made with another {', '.join(changed)}; "
                "choose another --out, or delete that folder"
            )
    elif any(out.glob("samples*.jsonl")):
        raise DataError(f"{out}: holds rows without the {SETTINGS} of their run; choose another")
    write_whole(described, json.dumps(settings, indent=2) + "\n")


def _facts(path: Path) -> dict[str, Any]:
    return read_object(path, "give a folder that eval --out wrote to its end")


def _whole_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a file that may not be there; half a line, left by a kill, is none."""
    if path.is_file():
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith("\n"):
                    yield number, line


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
        if not isinstance(row["sample_id"], str):
            raise ValueError(f"sample_id {row['sample_id']!r}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _no_row(path, number, error) from error
    return row


def _no_row(path: Path, number: int, error: Exception) -> DataError:
    return DataError(f"{path}:{number}: is no row of an evaluation ({error}); choose another --out")
