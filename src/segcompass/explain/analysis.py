"""All that `segcompass analyze` measures, in one pass over answers; figures are drawn afterwards.

Answers are `Prediction`s, live or read back from where `io.outputs.save` put them: both give the
same rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from segcompass.explain import figures
from segcompass.explain.activation_patterns import ActivationPatterns
from segcompass.explain.concept_counts import ConceptCounts
from segcompass.explain.correlation import (
    Quality,
    by_answer,
    correlations,
    needs_of_pairs,
    quality,
    right_and_wrong,
    shows,
)
from segcompass.explain.instance_coverage import InstanceCoverage
from segcompass.explain.panels import draw_panels
from segcompass.io.errors import DataError
from segcompass.io.files import read_object, write_whole
from segcompass.io.outputs import save, stem_of
from segcompass.io.saved import load_prediction
from segcompass.learning.watching.panels import choose
from segcompass.types import Prediction, Sample

PANELS = 6
ANSWERS = "answers.json"
OF_CONCEPTS = ("activation_patterns", "instance_coverage")  # figures that concepts alone make


class Model(Protocol):
    """What answers."""

    @property
    def name(self) -> str:
        """What it was loaded from."""

    @property
    def fingerprint(self) -> str:
        """Tells its weights and config from any others."""

    def predict_batch(
        self, images: Sequence[Any], instructions: Sequence[str], *, force_format: bool
    ) -> list[Prediction]:
        """Answer a batch, greedily."""


def answers(
    model: Model,
    samples: Sequence[Sample],
    *,
    saved: Path | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Sample, Prediction]]:
    """Every sample with the model's answer, batch by batch.

    Args:
        model: answers what is not saved yet; its answers are not held to their form.
        samples: what is asked.
        saved: folder from which answers of an earlier run are read, and to which new ones are
            written; None keeps none.
        batch_size: samples that go through the model together.
        progress: called with (samples done, samples in all).

    Raises:
        DataError: the folder holds answers of another model, or damaged ones.
    """
    if saved is not None:
        _claim(saved, {"model": model.name, "fingerprint": model.fingerprint})
    for start in range(0, len(samples), batch_size):
        if progress is not None:
            progress(start, len(samples))
        batch = samples[start : start + batch_size]
        known = {} if saved is None else _saved(saved, batch)
        todo = [sample for sample in batch if sample.sample_id not in known]
        if todo:
            made = model.predict_batch(
                [s.image_path for s in todo], [s.instruction for s in todo], force_format=False
            )
            for sample, prediction in zip(todo, made, strict=True):
                known[sample.sample_id] = replace(prediction, source=str(sample.image_path))
                if saved is not None:
                    save(known[sample.sample_id], saved)
        yield from ((sample, known[sample.sample_id]) for sample in batch)
    if progress is not None:
        progress(len(samples), len(samples))


def _claim(folder: Path, whose: dict[str, str]) -> None:
    """Note whose answers the folder holds; refuse it if they are another model's."""
    note = folder / ANSWERS
    way_out = "choose another folder, or delete this one"
    if note.is_file() and (found := read_object(note, way_out)) != whose:
        raise DataError(f"{note}: the answers here are another model's, {found}; {way_out}")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(note, json.dumps(whose) + "\n")


def _saved(folder: Path, batch: Sequence[Sample]) -> dict[str, Prediction]:
    """The answers of the batch that are in the folder."""
    paths = {
        s.sample_id: folder / f"{stem_of(str(s.image_path), s.instruction)}.json" for s in batch
    }
    return {name: load_prediction(path) for name, path in paths.items() if path.is_file()}


class Analysis:
    """Takes in answers one by one, then writes figures and summary.

    Not every interface shows concepts or heatmaps; figures that need them are left out.

    Args:
        shown: ids of the samples to show as panels, chosen before their answers are known.
        counts: also counts what concept cards need.
    """

    def __init__(self, shown: Sequence[str] = (), counts: ConceptCounts | None = None) -> None:
        self.patterns, self.coverage = ActivationPatterns(), InstanceCoverage()
        self.qualities: list[Quality] = []
        self.counts = counts
        self._has: set[str] = set()  # what the answers show
        self._shown, self._panels = set(shown), list[tuple[Prediction, Quality]]()

    def add(self, sample: Sample, prediction: Prediction) -> None:
        """Take in one answer."""
        self.qualities.append(quality(sample, prediction))
        self._has |= shows(prediction)
        if prediction.codes is not None:
            self.patterns.add(sample, prediction)
            self.coverage.add(sample, prediction)
        if sample.sample_id in self._shown:
            self._panels.append((prediction, self.qualities[-1]))
        if self.counts is not None:
            self.counts.add(sample, prediction)

    def write(self, out: Path) -> dict[str, Any]:
        """Write every figure with its data; returns the summary: n, r, p and intervals."""
        out.mkdir(parents=True, exist_ok=True)
        concepts = self._write_concepts(out) if "concepts" in self._has else {}
        figures.write_csv(out / "samples.csv", [asdict(row) for row in self.qualities])
        ranges = by_answer(self.qualities, self._has)
        figures.write_csv(out / "answer_ranges.csv", [_flat(row) for row in ranges])
        found = {pair.name: pair for pair in correlations(self.qualities, self._has)}
        for name, pair in found.items():
            figures.write_csv(out / f"{name}.csv", pair.rows())
            figures.draw_correlation(pair, out / name)
        if ranges:
            figures.draw_thoughts(ranges, found["thought_mask"], out / "answer_ranges")
        if self._panels:
            draw_panels(self._panels, out / "panels")
            figures.write_csv(out / "panels.csv", [asdict(row) for _, row in self._panels])
        return {
            "samples": len(self.qualities),
            **concepts,
            "correlations": {name: pair.summary() for name, pair in found.items()},
            "answer_ranges": ranges,
            "right_and_wrong_answers": right_and_wrong(self.qualities),
            "absent": absent(self._has),
        }

    def _write_concepts(self, out: Path) -> dict[str, Any]:
        """The figures of :data:`OF_CONCEPTS`, and what the summary tells of them."""
        patterns, coverage = self.patterns.rows(), self.coverage.rows()
        for name, rows in zip(OF_CONCEPTS, (patterns, coverage), strict=True):
            figures.write_csv(out / f"{name}.csv", rows)
        figures.draw_patterns(patterns, out / "activation_patterns")
        figures.draw_coverage(coverage, out / "instance_coverage")
        return {
            "activation_patterns": _at(patterns, "threshold", (0.0, 0.1, 1.0)),
            "instance_coverage": _at(coverage, "percent", (5, 10, 20, 30, 40, 50)),
        }


def absent(shown: Collection[str]) -> dict[str, list[str]]:
    """The figures that are left out, by what the answers would have to show for them."""
    found: dict[str, list[str]] = {}
    needs_of = {name: ["concepts"] for name in OF_CONCEPTS} | needs_of_pairs()
    for figure, needs in needs_of.items():
        missing = [need for need in needs if need not in shown]
        if missing:
            found.setdefault(missing[0], []).append(figure)
    return found


def panel_ids(samples: Sequence[Sample]) -> list[str]:
    """Samples to show: of different pictures and kinds, with a target, in the set's order."""
    return [s.sample_id for s in choose([s for s in samples if s.targets], PANELS)]


def _at(rows: Sequence[dict[str, Any]], key: str, wanted: Sequence[float]) -> list[dict[str, Any]]:
    """Of a figure's data, the rows nearest to some places of its x axis."""
    places = {row[key] for row in rows}
    nearest = {min(places, key=lambda place: abs(place - w)) for w in wanted} if places else set()
    return [row for row in rows if row[key] in nearest]


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row without lists: an interval becomes two columns."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, list):
            stem = name.removesuffix("_interval")
            flat |= {f"{stem}_low": value[0], f"{stem}_high": value[1]}
        else:
            flat[name] = value
    return flat
