"""Run a model over a data set and score it: every sample, from its own chain of thought.

Which masks count is settled by the model's confidences alone; the target is looked at only when a
finished answer is scored. With an ``out`` folder every sample leaves a row there at once, and a
later run with the same settings goes on where the first one stopped.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from segcompass.data.samples import read_dataset
from segcompass.data.scenes.grammar import resolve
from segcompass.evaluation.metrics import Metrics, PairScore, score_pair
from segcompass.io import masks
from segcompass.io.errors import DataError
from segcompass.io.images import load_image
from segcompass.types import Prediction, Sample, Status

CONTROLS = ("shuffle-questions", "shuffle-images")
ROWS, SETTINGS, METRICS = "samples.jsonl", "run.json", "metrics.json"
PACKAGES = ("segcompass", "torch", "transformers", "numpy")


class Model(Protocol):
    """What is measured."""

    @property
    def name(self) -> str:
        """What it was loaded from."""

    @property
    def fingerprint(self) -> str:
        """Tells its weights and config from any others."""

    def predict_batch(
        self,
        images: Sequence[Any],
        instructions: Sequence[str],
        *,
        force_format: bool,
        paths: str,
    ) -> list[Prediction]:
        """Answer a batch, greedily."""


@dataclass(frozen=True)
class Question:
    """What the model is given for a sample: its own picture and words, or a control's."""

    sample: Sample
    image_path: Path
    instruction: str


def evaluate(
    model: Model,
    data: Path,
    split: str,
    *,
    layout: str | None = None,
    limit: int | None = None,
    out: Path | None = None,
    batch_size: int = 32,
    control: str | None = None,
    force_format: bool = False,
    paths: str = "both",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure ``model`` on one split.

    Args:
        model: the model to measure; greedy, so that the same run gives the same figures.
        data: folder of the data set.
        split: train, val, test, testA or testB.
        layout: how the data lies on disk; None finds out.
        limit: only the first so many samples; None takes all.
        out: folder for ``samples.jsonl`` (a row for every sample), ``run.json`` and
            ``metrics.json``; rows that are there already are not measured again.
        batch_size: samples that go through the model together.
        control: None; "shuffle-questions" gives every picture another picture's question,
            "shuffle-images" every question another picture. Both are scored on the sample's own
            target: a model that looks and reads must fail.
        force_format: hold the answer to its form.
        paths: what the slot queries are made of: tokens, concepts, or both.
        progress: called with (samples done, samples in all).

    Returns:
        The figures of `segcompass.evaluation.metrics.Metrics`, the settings, the environment.

    Raises:
        DataError: no samples, an unknown control, pictures of another size than the data set says,
            or ``out`` holds rows of another run.
    """
    samples = read_dataset(data, split, layout=layout, limit=limit)
    if not samples:
        raise DataError(f"{data}: the split {split!r} holds no samples; choose another")
    questions = pose(samples, control)
    settings = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "data": str(data),
        "split": split,
        "layout": layout,
        "control": control,
        # Without a control the first n samples are the same whatever the limit.
        "limit": limit if control else None,
        "force_format": force_format,
        "paths": paths,
    }
    log = _Log(out, settings)
    todo = [q for q in questions if q.sample.sample_id not in log.scores]
    for start in range(0, len(todo), batch_size):
        if progress is not None:
            progress(len(questions) - len(todo) + start, len(questions))
        batch = todo[start : start + batch_size]
        log.add(_answer(model, batch, force_format=force_format, paths=paths))
    if progress is not None:
        progress(len(questions), len(questions))
    figures = Metrics(log.scores[s.sample_id] for s in samples).result()
    result = figures | settings | {"limit": limit, "environment": _environment()}
    if out is not None:
        _replace(out / METRICS, json.dumps(result, indent=2) + "\n")
    return result


def pose(samples: Sequence[Sample], control: str | None) -> list[Question]:
    """What the model is asked for each sample.

    Under a control, each picture is paired with the one half the data set away, so that no sample
    keeps its own and every run pairs alike.

    Raises:
        DataError: the control is unknown, or there are not two pictures to exchange.
    """
    if control is None:
        return [Question(s, s.image_path, s.instruction) for s in samples]
    if control not in CONTROLS:
        raise DataError(f"no control is called {control!r}; choose one of {', '.join(CONTROLS)}")
    by_image: dict[Path, list[Sample]] = {}
    for sample in samples:
        by_image.setdefault(sample.image_path, []).append(sample)
    if len(by_image) < 2:
        raise DataError(
            f"{control} needs two pictures or more, found {len(by_image)}; raise --limit"
        )
    images = list(by_image)
    away = len(images) // 2
    partner = {image: images[(i + away) % len(images)] for i, image in enumerate(images)}
    if control == "shuffle-images":
        return [Question(s, partner[s.image_path], s.instruction) for s in samples]
    posed = []
    asked = dict.fromkeys(images, 0)
    for sample in samples:
        others = by_image[partner[sample.image_path]]
        other = others[asked[sample.image_path] % len(others)]
        asked[sample.image_path] += 1
        posed.append(Question(sample, sample.image_path, other.instruction))
    return posed


def _answer(
    model: Model, batch: Sequence[Question], *, force_format: bool, paths: str
) -> Iterator[tuple[PairScore, dict[str, Any]]]:
    """Predict a batch and score it; with each score, what else its row holds."""
    images = [_picture(question) for question in batch]
    instructions = [question.instruction for question in batch]
    found = model.predict_batch(images, instructions, force_format=force_format, paths=paths)
    for question, prediction in zip(batch, found, strict=True):
        yield _score(question.sample, prediction), _details(question, prediction)


def _picture(question: Question) -> UInt8[np.ndarray, "H W 3"]:
    """The picture to show, of the size that the sample's target has."""
    image = load_image(question.image_path)
    height, width = question.sample.image_hw
    if image.shape[:2] == (height, width):
        return image
    if question.image_path == question.sample.image_path:
        raise DataError(
            f"{question.image_path}: is {image.shape[1]}x{image.shape[0]} px, the data set says "
            f"{width}x{height}; fetch the original picture"
        )
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _score(sample: Sample, prediction: Prediction) -> PairScore:
    return score_pair(
        prediction.slot_masks[prediction.accepted].any(axis=0),
        masks.union(sample.targets, sample.image_hw),
        None if sample.ignore is None else masks.decode(sample.ignore),
        sample_id=sample.sample_id,
        status=prediction.status,
        kind=sample.kind,
        reasoning_correct=_names_the_targets(sample, prediction),
    )


def _names_the_targets(sample: Sample, prediction: Prediction) -> bool | None:
    """Whether the thought names exactly the targets; None where the data set cannot tell."""
    if not sample.objects:
        return None
    if prediction.status not in (Status.OK, Status.NO_TARGET):
        return False
    named = resolve(prediction.reasoning, sample.objects)
    if named is None:
        return False
    return {sample.objects[i].ann_id for i in named} == set(sample.target_ids)


def _details(question: Question, prediction: Prediction) -> dict[str, Any]:
    return {
        "image": str(question.image_path),
        "instruction": question.instruction,
        "text": prediction.text,
        "confidences": [round(float(score), 6) for score in prediction.slot_scores],
        "masks": [masks.encode(mask) for mask in prediction.slot_masks[prediction.accepted]],
    }


class _Log:
    """Scores so far, in memory and, given a folder, in its ``samples.jsonl``."""

    def __init__(self, out: Path | None, settings: dict[str, Any]) -> None:
        self.scores: dict[str, PairScore] = {}
        self.rows = None if out is None else out / ROWS
        if out is None or self.rows is None:
            return
        out.mkdir(parents=True, exist_ok=True)
        described = out / SETTINGS
        if described.is_file():
            self._same_run(described, settings)
        elif self.rows.exists():
            raise DataError(f"{self.rows}: has no {SETTINGS} beside it; choose another --out")
        _replace(described, json.dumps(settings, indent=2) + "\n")
        if self.rows.is_file():
            self._read()

    def add(self, answers: Iterator[tuple[PairScore, dict[str, Any]]]) -> None:
        """Keep a batch: all of its rows in one write."""
        lines = []
        for score, details in answers:
            self.scores[score.sample_id] = score
            lines.append(json.dumps(asdict(score) | details, ensure_ascii=False) + "\n")
        if self.rows is not None:
            with self.rows.open("a", encoding="utf-8", errors="replace") as rows:
                rows.write("".join(lines))

    @staticmethod
    def _same_run(described: Path, settings: dict[str, Any]) -> None:
        before = json.loads(described.read_text(encoding="utf-8"))
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise DataError(
                f"{described}: its rows were made with another {', '.join(changed)}; "
                "choose another --out, or delete that folder"
            )

    def _read(self) -> None:
        """Take over the rows of an earlier run; half a line, left by a kill, is cut off."""
        assert self.rows is not None
        text = self.rows.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            _replace(self.rows, whole)
        names = {field.name for field in fields(PairScore)}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = {k: v for k, v in json.loads(line).items() if k in names}
                score = PairScore(**row | {"status": Status(row["status"])})
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise DataError(
                    f"{self.rows}:{number}: is no row of an evaluation ({error}); "
                    "choose another --out"
                ) from error
            self.scores[score.sample_id] = score


def _environment() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions, "device": device}


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
