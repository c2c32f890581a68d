"""Judge the predictions of another tool, read from a file; no picture is opened.

Two forms are read. JSONL has one object per sample: {"sample_id" or "id", "masks", "scores",
"status"}, of which scores and status may be absent; a ``samples.jsonl`` of ours is one. COCO
results are one list with an object per mask: {"sample_id" or "image_id", "segmentation", "score"}.
Masks are COCO's run lengths, of either form, or polygons.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segcompass.evaluation.answers import Answer, Question
from segcompass.evaluation.benchmark import Progress, measure
from segcompass.evaluation.splits import Broken, Split
from segcompass.io import masks
from segcompass.io.errors import DataError
from segcompass.types import Rle, Sample, Status

OnBroken = Callable[[Broken], None]


@dataclass
class Entry:
    """What a file says about one sample."""

    place: str  # file and line
    masks: list[Any] = field(default_factory=list)  # as COCO writes a segmentation
    scores: list[Any] | None = None  # None: all are certain
    status: Status | None = None

    def answer(self, hw: tuple[int, int], threshold: float) -> Answer:
        """The entry as an answer about a picture of that size; DataError where it is damaged."""
        try:
            slots = [_rle(mask, hw) for mask in self.masks]
            return Answer.of_masks(slots, self.scores, threshold=threshold, status=self.status)
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.place}: {error}") from error


def judge_predictions(
    path: Path,
    data: Path,
    split: str,
    *,
    threshold: float = 0.0,
    layout: str | None = None,
    out: Path | None = None,
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge a file of predictions on one split, as ``segcompass eval`` judges a model.

    Args:
        path: JSONL or COCO results.
        data: folder of the data set.
        split: train, val, test, testA or testB.
        threshold: score above which a mask counts; masks without a score are certain.
        layout: how the data lies on disk; None finds out.
        out: folder for rows and figures; None keeps nothing.
        skip_broken: name the predictions and samples that cannot be read, and judge the rest.
        progress: called with (samples done, samples in all).

    Returns:
        The figures of ``segcompass eval --json``, and under "missing" the ids of samples without a
        prediction: they count as "nothing matches".

    Raises:
        DataError: an unknown or repeated sample, or a damaged mask; names the line.
    """
    part = Split.read(data, split, layout=layout, skip_broken=skip_broken)
    entries = read_predictions(path, part.samples, part.broken.append if skip_broken else None)
    return measure(
        _FromFile(path, entries, threshold),
        part,
        out=out,
        progress=progress,
        notes={"missing": [s.sample_id for s in part.samples if s.sample_id not in entries]},
    )


def read_predictions(
    path: Path, samples: Sequence[Sample], on_broken: OnBroken | None = None
) -> dict[str, Entry]:
    """Read a file of predictions about ``samples``.

    Args:
        path: JSONL or COCO results.
        samples: what may be predicted.
        on_broken: is told of what cannot be used; without it, the first such thing is an error.

    Returns:
        By sample id. Masks are only looked at when they are judged.

    Raises:
        DataError: an unknown or repeated sample, or no JSON; names the line.
    """
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    reader = _Coco(samples) if text.lstrip()[:1] == "[" else _Jsonl(samples)
    for place, item in reader.items(path, text):
        try:
            reader.take(place, item)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            odd = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            if on_broken is None:
                raise DataError(f"{place}: {odd}") from error
            on_broken(Broken(place, odd))
    return reader.entries


class _Jsonl:
    """One object per sample."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.entries: dict[str, Entry] = {}
        self.known = {sample.sample_id for sample in samples}

    @staticmethod
    def items(path: Path, text: str) -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}:{number}", line

    def take(self, place: str, line: str) -> None:
        item = _object(json.loads(line))
        sample_id = item["sample_id"] if "sample_id" in item else item["id"]
        if sample_id not in self.known:
            raise ValueError(f"{sample_id!r} is no sample of this split; choose another split")
        if sample_id in self.entries:
            raise ValueError(
                f"{sample_id!r} was predicted before, in {self.entries[sample_id].place}; keep one"
            )
        found, status = item["masks"], item.get("status")
        if not isinstance(found, list):
            raise ValueError(f"masks are a list, found {found!r:.40}")
        ended = None if status is None else Status(status)
        self.entries[sample_id] = Entry(place, found, item.get("scores"), ended)


class _Coco:
    """One object per mask."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.entries: dict[str, Entry] = {}
        self.known = {sample.sample_id for sample in samples}
        self.of_image: dict[int, list[str]] = {}
        for sample in samples:
            self.of_image.setdefault(sample.image_id, []).append(sample.sample_id)

    @staticmethod
    def items(path: Path, text: str) -> Iterator[tuple[str, Any]]:
        try:
            results = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is no valid JSON ({error}); write it again") from error
        for number, result in enumerate(results, start=1):
            yield f"{path}, result {number}", result

    def take(self, place: str, result: Any) -> None:
        item = _object(result)
        sample_id = self._sample(item)
        mask, score = item["segmentation"], item["score"]
        entry = self.entries.setdefault(sample_id, Entry(place, scores=[]))
        if mask in entry.masks:
            raise ValueError(f"repeats a mask of {sample_id!r}; keep one")
        assert entry.scores is not None
        entry.masks.append(mask)
        entry.scores.append(score)

    def _sample(self, item: dict[str, Any]) -> str:
        if "sample_id" in item:
            if item["sample_id"] not in self.known:
                raise ValueError(f"{item['sample_id']!r} is no sample of this split")
            return str(item["sample_id"])
        about = self.of_image.get(item["image_id"], [])
        if len(about) != 1:
            raise ValueError(
                f"{len(about)} samples of this split are about image {item['image_id']!r}; "
                "name one by its sample_id"
            )
        return about[0]


@dataclass(frozen=True)
class _FromFile:
    """A file of predictions as a giver of answers."""

    path: Path
    entries: dict[str, Entry]
    threshold: float

    @property
    def settings(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
        return {"model": str(self.path), "fingerprint": digest, "threshold": self.threshold}

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        samples = [question.sample for question in questions]
        nothing = Entry("")
        return [
            self.entries.get(s.sample_id, nothing).answer(s.image_hw, self.threshold)
            for s in samples
        ]


def _object(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ValueError(f"is no JSON object: {item!r:.40}")
    return item


def _rle(mask: Any, hw: tuple[int, int]) -> Rle:
    """A mask as run lengths that make up the whole picture."""
    rle = masks.from_segmentation(mask, hw)
    masks.decode(rle)  # pycocotools does not notice missing runs
    return rle
