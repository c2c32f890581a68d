"""Interfaces side by side: train and judge every arm, measure what it costs and what it shows.

OUT/ARM-SEED/footprint.json    seconds, memory, which explanations exist, and of which answers
OUT/ARM-SEED/shown/            the answers that were measured, as `segcompass predict --out` writes
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from segcompass.evaluation import comparison
from segcompass.evaluation.footprint import Footprint, measure_footprint
from segcompass.evaluation.splits import Split
from segcompass.io.errors import ConfigError, DataError
from segcompass.io.files import read_object, write_whole
from segcompass.io.outputs import save, stem_of
from segcompass.learning.arms import TRAINED, Experiment, JudgeConfig, model_of, run_arm
from segcompass.pipeline import SegCompass
from segcompass.types import Sample

FOOTPRINT, SHOWN = "footprint.json", "shown"
AGAIN = "delete it: a later call writes it again"
ANSWERED = ("fingerprint", "force_format", "paths", "threshold")  # what answers depend on


def compare(
    experiment: Experiment, told: Callable[[str], None] = lambda _text: None
) -> list[dict[str, Any]]:
    """Train, judge and measure every arm with every seed; what is done is not done again.

    Args:
        experiment: whose arms are the interfaces.
        told: hears what is about to be done.

    Returns:
        A row of `evaluation.comparison.compare` for each arm.

    Raises:
        ConfigError: if an arm is judged on other samples than the rest; else as of `arms.run_arm`.
    """
    for name in experiment.arms:
        if _samples_of(experiment.judge(name)) != _samples_of(experiment.eval):
            raise ConfigError(f"arms.{name}.eval: all arms of a comparison have the same samples")
    samples = [sample.sample_id for sample in _asked(experiment)]
    rows = []
    for name in experiment.arms:
        runs = []
        for folder in experiment.runs(name):
            told(f"{folder.name}: training, judging, measuring what is not done yet")
            figures = run_arm(experiment, name, folder)
            runs.append(_judged(experiment, name, folder, {key: figures[key] for key in ANSWERED}))
        rows.append(comparison.compare(name, runs, samples))
    return rows


def _samples_of(judge: JudgeConfig) -> dict[str, Any]:
    return judge.model_dump(include={"data", "split", "layout", "limit"})


def shown_file(folder: Path, sample: Sample) -> Path:
    """Where a run's answer to a shown sample is kept."""
    return folder / SHOWN / f"{stem_of(str(sample.image_path), sample.instruction)}.json"


def shown_samples(experiment: Experiment) -> list[Sample]:
    """The samples that are measured and shown: the first of every kind of question in turn."""
    return varied(_asked(experiment))[: experiment.shown]


def _asked(experiment: Experiment) -> list[Sample]:
    """All samples that the arms are judged on."""
    judge = experiment.eval
    return Split.read(judge.data, judge.split, layout=judge.layout, limit=judge.limit).samples


def varied(samples: Sequence[Sample]) -> list[Sample]:
    """The same samples: of each kind the first, then of each the second, and so on."""
    met: Counter[str | None] = Counter()
    turns = []
    for sample in samples:
        turns.append(met[sample.kind])
        met[sample.kind] += 1
    return [samples[i] for i in sorted(range(len(samples)), key=turns.__getitem__)]


def _judged(
    experiment: Experiment, name: str, folder: Path, answered: dict[str, Any]
) -> comparison.Judged:
    """A run with its footprint, measured unless that is done for just such answers."""
    path = folder / FOOTPRINT
    shown = [shown_file(folder, sample) for sample in shown_samples(experiment)]
    known = read_object(path, AGAIN) if path.exists() else {}
    if known.pop("answered", None) != answered or not all(file.exists() for file in shown):
        known = _measure(experiment, name, folder)._asdict()
        write_whole(path, json.dumps({**known, "answered": answered}) + "\n")
    try:
        footprint = Footprint(**known)
    except TypeError as error:
        raise DataError(f"{path} is no footprint of this version ({error}); {AGAIN}") from error
    return comparison.Judged(folder / "eval", footprint, _parameters(folder / TRAINED))


def _parameters(path: Path) -> int | None:
    """How many parameters a run has trained; None where nothing was trained."""
    if not path.exists():
        return None
    found = read_object(path, AGAIN).get("parameters")
    if not isinstance(found, int):
        raise DataError(f"{path} says {found!r} of the trained parameters; {AGAIN}")
    return found


def _measure(experiment: Experiment, name: str, folder: Path) -> Footprint:
    """Answer the shown samples, and keep the answers."""
    model = SegCompass.from_pretrained(model_of(experiment, name, folder))
    samples = shown_samples(experiment)
    options = experiment.judge(name).model_dump(include={"force_format", "paths", "threshold"})
    footprint, predictions = measure_footprint(model, samples, **options)
    for sample, prediction in zip(samples, predictions, strict=True):
        save(replace(prediction, source=str(sample.image_path)), folder / SHOWN)
    return footprint
