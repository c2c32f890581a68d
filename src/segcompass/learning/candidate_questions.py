"""Training questions with a finished model's candidates, and what each candidate deserves.

    samples -> those to train the judge on, and those that tell what it is worth
            -> the model, on all ranks -> FOLDER/candidates.rankN.jsonl -> FOLDER/candidates.jsonl

A row counts once it ends in a newline. So collecting may be killed at any moment and go on with any
number of ranks, which share out what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segcompass.grounding.segmenters import encoder_of
from segcompass.interfaces.candidate_rerank import (
    CandidateRerank,
    CandidateRerankConfig,
    show_attention,
)
from segcompass.interfaces.candidates import iou
from segcompass.io import masks
from segcompass.io.errors import ConfigError
from segcompass.io.files import write_whole
from segcompass.io.progress import progress
from segcompass.learning.engine.distributed import World
from segcompass.model_folder import Parts
from segcompass.pipeline import SegCompass
from segcompass.reasoning.scorer import TOP
from segcompass.types import Prediction, Rle, Sample, Score, Status

CANDIDATES = "candidates.jsonl"
PARTS = "candidates.rank*.jsonl"


class Question(NamedTuple):
    """A training question, and the candidates for its answer."""

    sample: Sample
    masks: list[Rle]
    scores: list[int]  # 0 … 9, what each one deserves
    has_direct: bool  # the first one is the source's own answer; else that is empty


class _Nobody:
    """Judges nothing: its candidates are wanted, not a choice among them."""

    def score(self, pictures: Sequence[np.ndarray], _: Sequence[str]) -> list[Score]:
        return [Score(0.0, "", Status.OK)] * len(pictures)


def collect(
    parts: Parts,
    head: CandidateRerankConfig,
    training: Sequence[Sample],
    apart: Sequence[Sample],
    folder: Path,
    together: int,
) -> tuple[list[Question], list[Question]]:
    """Find the candidates of every sample; what the folder holds already is not found again.

    Args:
        parts: Of the model that finds them; in evaluation mode afterwards.
        head: Which candidates.
        training: Samples to train on.
        apart: Samples not to train on.
        folder: Of the stage, seen by all ranks.
        together: Questions that are answered at once.

    Returns:
        Both kinds of samples in their order, the same on every rank.

    Raises:
        ConfigError: if the folder holds candidates of another model or choice, or of other samples.
    """
    world, path, samples = World.current(), folder / CANDIDATES, [*training, *apart]
    # A judge that is in training there knows the candidates of all but those set apart.
    made = {"model": parts.fingerprint, "held_out": len(apart)}
    origin = json.dumps({**made, **head.candidates.model_dump()})
    _merge(path, origin, world)
    known = _rows(path, samples)
    todo = [i for i in range(len(samples)) if i not in known][world.rank :: world.size]
    show_attention(parts.policy, head.candidates)
    interface = CandidateRerank(head, parts.interface, _Nobody())
    encoder, threshold = encoder_of(parts.sam), parts.config.threshold
    model = SegCompass(parts.policy, encoder, interface, threshold=threshold).eval()
    model.to(world.device)
    part = folder / PARTS.replace("*", str(world.rank))
    with part.open("w", encoding="utf-8") as file, progress("candidates") as update:
        for start in range(0, len(todo), together):
            batch = todo[start : start + together]
            for i, row in zip(batch, _found(model, [samples[i] for i in batch]), strict=True):
                file.write(json.dumps({"index": i, **row}) + "\n")
            file.flush()
            update(start + len(batch), len(todo))
    _merge(path, origin, world)
    rows = _rows(path, samples)
    found = [
        Question(sample, rows[i]["masks"], rows[i]["scores"], rows[i]["has_direct"])
        for i, sample in enumerate(samples)
    ]
    return found[: len(training)], found[len(training) :]


def _merge(path: Path, origin: str, world: World) -> None:
    """Bring all ranks' rows into one file, on rank 0 while the others wait."""
    world.barrier()  # all have written their rows
    problem = None
    if world.is_main:
        try:
            _join(path, origin)
        except ConfigError as error:
            problem = error
    world.agree(problem)


def _join(path: Path, origin: str) -> None:
    """Put the rows of all parts into the file, whose first line says what found the candidates."""
    head, *known = _whole_lines(path) or [origin]
    if head != origin:
        raise ConfigError(
            f"{path} holds candidates of another model or choice ({head}); delete {path.parent}, "
            "or set another `run` folder"
        )
    parts = sorted(path.parent.glob(PARTS))
    lines = {path: known, **{part: _whole_lines(part) for part in parts}}
    rows = {_parse(file, line)["index"]: line for file in lines for line in lines[file]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{line}\n" for line in [origin, *(rows[i] for i in sorted(rows))]))
    for part in parts:
        part.unlink()


def _rows(path: Path, samples: Sequence[Sample]) -> dict[int, dict[str, Any]]:
    """Rows by their sample's number; raises ConfigError where they are of other samples."""
    rows = {row["index"]: row for row in (_parse(path, line) for line in _whole_lines(path)[1:])}
    names = {i: sample.sample_id for i, sample in enumerate(samples)}
    if any(names.get(i) != row["sample"] for i, row in rows.items()):
        raise ConfigError(
            f"{path} holds candidates of other samples; delete {path.parent}, or set another "
            "`run` folder"
        )
    return rows


def _parse(path: Path, line: str) -> dict[str, Any]:
    """A row; raises ConfigError where the line is none."""
    try:
        row: dict[str, Any] = json.loads(line)
        if missing := {"index", "sample", "masks", "scores", "has_direct"} - set(row):
            raise ValueError(f"without {', '.join(sorted(missing))}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} holds a line that is no row of candidates ({error}); delete {path.parent}, "
            "or set another `run` folder"
        ) from error
    return row


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file, without one that a killed run left unfinished."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return lines


def _found(model: SegCompass, batch: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    """The rows of a batch."""
    answers = model.predict_batch([s.image_path for s in batch], [s.instruction for s in batch])
    for sample, answer in zip(batch, answers, strict=True):
        yield _row(sample, answer)


def _row(sample: Sample, answer: Prediction) -> dict[str, Any]:
    weighed = answer.candidates
    found = [] if weighed is None else [masks.encode(mask) for mask in weighed.masks]
    return {
        "sample": sample.sample_id,
        "masks": found,
        "scores": deserved(sample, found),
        "has_direct": weighed is not None and "direct" in "".join(weighed.sources[:1]).split(", "),
    }


def deserved(sample: Sample, found: Sequence[Rle]) -> list[int]:
    """What each candidate would score if the judge knew the targets: nine times its IoU, rounded.

    Ignored pixels count neither way.
    """
    return [int(TOP * overlap + 0.5) for overlap in overlaps(sample, found)]


def overlaps(sample: Sample, found: Sequence[Rle]) -> list[float]:
    """The IoU of each mask with the target, 1 where both are empty; without ignored pixels."""
    target = masks.union(sample.targets, sample.image_hw)
    counts = np.ones_like(target) if sample.ignore is None else ~masks.decode(sample.ignore)
    return [iou(masks.decode(rle) & counts, target & counts) for rle in found]


def set_apart(
    samples: Sequence[Sample], count: int | None, share: float
) -> tuple[list[Sample], list[Sample]]:
    """The first samples, to train the judge on, and the last ones, about other pictures.

    The last ones are apart from the judge's stage, and from the joint stage too if
    ``train_joint.samples`` leaves them out. Warm-up knows no such limit: it may have seen them.

    Args:
        samples: All training samples, as every stage reads them.
        count: How many are wanted; None takes all.
        share: Of these, to be kept apart, 0 … 1. First ones about the same pictures are left out.
    """
    wanted = len(samples) if count is None else min(count, len(samples))
    kept = round(share * wanted)
    apart = list(samples[len(samples) - kept :])
    pictures = {sample.image_path for sample in apart}
    first = samples[: wanted - kept]
    return [sample for sample in first if sample.image_path not in pictures], apart
