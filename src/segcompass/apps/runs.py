"""Many pictures through one model: which work there is, and what came of each piece."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segcompass.io.assets import MissingAssetError, bundled
from segcompass.io.errors import DataError, SegCompassError
from segcompass.io.progress import progress

if TYPE_CHECKING:
    from segcompass.pipeline import SegCompass
    from segcompass.types import Prediction


@dataclass(frozen=True)
class Job:
    """One picture and what is asked of it."""

    source: Path
    instruction: str


@dataclass(frozen=True)
class Failure:
    """A source that gave no prediction, and why."""

    source: str
    error: Exception


def pair_up(sources: Sequence[str], instructions: Sequence[str]) -> tuple[list[Job], list[Failure]]:
    """Ask every instruction of every picture that the sources stand for.

    Args:
        sources: files, folders and patterns.
        instructions: each is asked of each picture.

    Returns:
        The jobs, each once, and the sources that stand for no picture.
    """
    from segcompass.io.images import list_images

    jobs: dict[Job, None] = {}
    failures = []
    for source in sources:
        try:
            paths = list_images([source])
        except SegCompassError as error:
            failures.append(Failure(source, error))
        else:
            jobs.update(dict.fromkeys(Job(path, text) for path in paths for text in instructions))
    return list(jobs), failures


def read_jobs(path: Path) -> list[Job]:
    """Read pairs of picture and instruction.

    Args:
        path: a CSV with the columns ``image`` and ``instruction``, or JSONL (``.jsonl``) with these
            keys. Relative picture paths start from the file's own folder.

    Raises:
        DataError: a row lacks one of the two, or the file is neither.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a CSV or JSONL of image and instruction")
    read = _jsonl_rows if path.suffix.lower() in {".jsonl", ".ndjson"} else _csv_rows
    jobs = []
    try:
        for number, row in read(path):
            image, text = row.get("image"), row.get("instruction")
            if not isinstance(image, str) or not isinstance(text, str) or not image:
                raise DataError(
                    f"{path}:{number}: found {sorted(map(str, row))}; every row needs the texts "
                    "'image' and 'instruction'"
                )
            jobs.append(Job(path.parent / image, text))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, csv.Error) as error:
        raise DataError(f"{path}: {error}; expected UTF-8 CSV, or JSON objects by line") from error
    if not jobs:
        raise DataError(f"{path}: holds no rows; expected 'image' and 'instruction' in each")
    return jobs


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:  # spreadsheets write a BOM
        reader = csv.DictReader(lines)
        for row in reader:
            yield reader.line_num, {k: v for k, v in row.items() if k is not None}


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            yield number, row if isinstance(row, dict) else {"(not an object)": row}


def demo_jobs() -> list[Job]:
    """The bundled pictures with their instructions (``assets/demo/demo.json``).

    Raises:
        MissingAssetError: this installation has them not.
    """
    listing = bundled("demo") / "demo.json"
    if not listing.is_file():
        raise MissingAssetError(f"{listing}: not in this installation; install the package again")
    rows = json.loads(listing.read_text(encoding="utf-8"))
    return [Job(listing.parent / row["image"], row["instruction"]) for row in rows]


def work_off(
    model: SegCompass,
    jobs: Sequence[Job],
    take: Callable[[Prediction | Failure], None],
    **options: Any,
) -> None:
    """Predict every job with a progress bar, handing each result on as soon as it is there."""
    with progress("predict") as moved:
        for done, result in enumerate(predict_jobs(model, jobs, **options), start=1):
            take(result)
            moved(done, len(jobs))


def predict_jobs(
    model: SegCompass, jobs: Sequence[Job], *, batch_size: int = 1, **options: Any
) -> Iterator[Prediction | Failure]:
    """Predict every job; one bad picture or instruction does not stop the others.

    Args:
        model: the loaded model.
        jobs: what to do, answered in this order.
        batch_size: jobs that go through the model together.
        **options: handed to ``SegCompass.predict_batch``.

    Yields:
        One prediction, or the reason there is none, for every job.
    """
    from segcompass.io.images import load_image

    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        images: list[Any] = []
        for job in batch:
            try:
                images.append(load_image(job.source))
            except (SegCompassError, OSError) as error:
                images.append(Failure(str(job.source), error))
        loaded = [i for i, image in enumerate(images) if not isinstance(image, Failure)]
        answers = dict(
            zip(
                loaded,
                _attempt(model, [batch[i] for i in loaded], [images[i] for i in loaded], options),
                strict=True,
            )
        )
        for i, image in enumerate(images):
            yield answers.get(i, image)


def _attempt(
    model: SegCompass, jobs: Sequence[Job], images: Sequence[Any], options: dict[str, Any]
) -> list[Prediction | Failure]:
    """Predict together; where the batch is refused, one by one, to find the job at fault."""
    if not jobs:
        return []
    try:
        found = model.predict_batch(images, [job.instruction for job in jobs], **options)
    except (SegCompassError, ValueError) as error:
        if len(jobs) == 1:
            return [Failure(str(jobs[0].source), error)]
        alone = zip(jobs, images, strict=True)
        return [
            result for job, image in alone for result in _attempt(model, [job], [image], options)
        ]
    return [replace(p, source=str(job.source)) for p, job in zip(found, jobs, strict=True)]


def summary(prediction: Prediction, *, top: int = 3) -> dict[str, str]:
    """One prediction as a row of a table, all text."""
    import numpy as np

    from segcompass.io.readings import slot_concepts

    shown = np.flatnonzero(prediction.accepted)
    read = [] if prediction.codes is None else slot_concepts(prediction)
    best: dict[int, float] = {}
    for concepts, accepted in zip(read, prediction.accepted, strict=False):
        for concept, weight in concepts if accepted else ():
            best[concept] = max(weight, best.get(concept, 0.0))
    strongest = sorted(best, key=lambda concept: -best[concept])[:top]
    return {
        "picture": Path(prediction.source or "image").name,
        "instruction": prediction.instruction,
        "status": prediction.status.value,
        "masks": str(len(shown)),
        "confidence": " ".join(f"{prediction.slot_scores[slot]:.2f}" for slot in shown) or "–",
        "seconds": f"{sum(prediction.timings.values()):.2f}",
        "top concepts": " ".join(f"#{concept}" for concept in strongest) or "–",
    }
