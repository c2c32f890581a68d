"""Run a model over a data set and score it: every sample, from its own chain of thought.

Which masks count is settled by the model's confidences alone; the target is looked at only when a
finished answer is scored. Under torchrun the processes share the samples out among them. With an
``out`` folder every sample leaves a row there at once, and a later run with the same settings goes
on where the first one stopped.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

from segcompass.evaluation.answers import Answer, Question, judge_answer, row_details
from segcompass.evaluation.candidates import weigh
from segcompass.evaluation.controls import pose
from segcompass.evaluation.metrics import Metrics
from segcompass.evaluation.run_log import METRICS, RunLog
from segcompass.evaluation.scoring import PairScore
from segcompass.evaluation.splits import Broken, Split
from segcompass.io.errors import DataError, SegCompassError
from segcompass.io.files import write_whole
from segcompass.learning.engine.distributed import World
from segcompass.types import Prediction

PACKAGES = ("segcompass", "torch", "transformers", "numpy")
Progress = Callable[[int, int], None]


class Model(Protocol):
    """What is measured."""

    @property
    def name(self) -> str:
        """What it was loaded from."""

    @property
    def fingerprint(self) -> str:
        """Tells its weights and config from any others."""

    @property
    def threshold(self) -> float:
        """Confidence above which a mask counts, unless another is asked for."""

    def predict_batch(
        self,
        images: Sequence[Any],
        instructions: Sequence[str],
        *,
        force_format: bool,
        threshold: float,
        paths: str,
    ) -> list[Prediction]:
        """Answer a batch, greedily."""

    def predict_paths(
        self,
        images: Sequence[Any],
        instructions: Sequence[str],
        *,
        force_format: bool,
        threshold: float,
    ) -> dict[str, list[Prediction]]:
        """The same answers as "both", and what each path alone makes of the same thoughts."""


class Answerer(Protocol):
    """Whoever gives the answers: a model, someone else's model, a file of predictions."""

    @property
    def settings(self) -> dict[str, Any]:
        """What its answers depend on."""

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer a batch."""


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
    threshold: float | None = None,
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure ``model`` on one split.

    Args:
        model: the model to measure; greedy, so that the same run gives the same figures.
        data: folder of the data set.
        split: train, val, test, testA or testB.
        layout: how the data lies on disk; None finds out.
        limit: only the first so many samples; None takes all.
        out: folder for ``samples.jsonl`` (a row for every sample), ``run.json`` and
            ``metrics.json``; rows that are there already are not measured again. Processes on
            several machines need a folder that all of them see.
        batch_size: samples that go through the model together.
        control: None; "shuffle-questions" gives every picture another picture's question,
            "shuffle-images" every question another picture. Both are scored on the sample's own
            target: a model that looks and reads must fail.
        force_format: hold the answer to its form.
        paths: what the slot queries are made of: tokens, concepts, or both; with both, each path
            is also measured alone, on the same thoughts.
        threshold: confidence above which a mask counts; None takes the model's.
        skip_broken: name the samples that cannot be read or judged, and judge the rest.
        progress: called with (samples done, samples in all).

    Returns:
        The figures of `segcompass.evaluation.metrics.Metrics`, the settings, the environment, and
        under "broken" what was skipped; the same in every process.

    Raises:
        DataError: no samples, an unknown control, pictures of another size than the data set says,
            or ``out`` holds rows of another run.
    """
    cut = model.threshold if threshold is None else threshold
    part = Split.read(data, split, layout=layout, limit=limit, skip_broken=skip_broken)
    answerer = _Greedy(model, force_format, paths, cut)
    return measure(
        answerer, part, out=out, batch_size=batch_size, control=control, progress=progress
    )


def measure(
    answerer: Answerer,
    split: Split,
    *,
    out: Path | None = None,
    batch_size: int = 32,
    control: str | None = None,
    progress: Progress | None = None,
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Judge whatever gives answers on one split; arguments and result as of ``evaluate``.

    ``notes`` are kept with the figures.
    """
    world = World.current()
    settings = answerer.settings | split.settings
    # Without a control the first n samples are the same whatever the limit.
    settings |= {"control": control, "limit": split.limit if control else None}
    questions = pose(split.samples, control)
    log = RunLog(out, settings, [s.sample_id for s in split.samples], world)
    todo = [q for q in questions if q.sample.sample_id not in log.scores]
    mine, found = todo[world.rank :: world.size], list[Broken]()
    for start in range(0, len(mine), batch_size):
        if progress is not None:
            progress(len(questions) - len(todo) + start * world.size, len(questions))
        log.add(_judge(answerer, mine[start : start + batch_size], found, split.skip_broken))
    if progress is not None:
        progress(len(questions), len(questions))
    log.close()
    broken = split.broken + [item for part in world.gather_objects(found) for item in part]
    scores = [log.scores[s.sample_id] for s in split.samples if s.sample_id in log.scores]
    if not scores:
        raise DataError(f"no sample could be judged; the first of {len(broken)}: {broken[0]}")
    result = Metrics(scores).result() | settings
    result |= dict(notes or {}) | {
        "limit": split.limit,
        "broken": [item._asdict() for item in broken],
        "environment": _environment() | {"processes": world.size},
    }
    if out is not None and world.is_main:
        write_whole(out / METRICS, json.dumps(result, indent=2) + "\n")
    return result


def _judge(
    answerer: Answerer, batch: Sequence[Question], broken: list[Broken], skip: bool
) -> Iterator[tuple[PairScore, dict[str, Any]]]:
    """Score a batch; with each score, what else its row holds.

    Where something is broken and may be skipped, the samples go one by one, so that the others of
    the batch are judged.
    """
    try:
        judged = [
            (judge_answer(question.sample, answer), row_details(question, answer))
            for question, answer in zip(batch, answerer.answer(batch), strict=True)
        ]
    except (SegCompassError, ValueError) as error:
        if not skip:
            raise
        if len(batch) > 1:
            for question in batch:
                yield from _judge(answerer, [question], broken, skip)
        else:
            broken.append(Broken(batch[0].sample.sample_id, str(error)))
        return
    yield from judged


@dataclass(frozen=True)
class _Greedy:
    """A model of ours as a giver of answers."""

    model: Model
    force_format: bool
    paths: str
    threshold: float

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "force_format": self.force_format,
            "paths": self.paths,
            "threshold": self.threshold,
        }

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        asked = [q.picture() for q in questions], [q.instruction for q in questions]
        how: dict[str, Any] = {"force_format": self.force_format, "threshold": self.threshold}
        if self.paths == "both":
            alone = self.model.predict_paths(*asked, **how)
            predictions = alone.pop("both")
        else:
            predictions, alone = self.model.predict_batch(*asked, paths=self.paths, **how), {}
        answers = [
            Answer.of(p, None if p.candidates is None else weigh(p, question.sample))
            for question, p in zip(questions, predictions, strict=True)
        ]
        return [
            replace(answer, alone={path: Answer.of(found[i]) for path, found in alone.items()})
            for i, answer in enumerate(answers)
        ]


def _environment() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions, "device": device}
