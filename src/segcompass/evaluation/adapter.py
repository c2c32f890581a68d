"""Judge any model that turns a picture and an instruction into masks: one method is enough.

See docs/adapter.md for an example.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from segcompass.evaluation.answers import Answer, Question
from segcompass.evaluation.benchmark import Progress, measure
from segcompass.evaluation.splits import Split
from segcompass.io import masks
from segcompass.io.errors import DataError
from segcompass.types import Rle


class Segmenter(Protocol):
    """What a model has to have."""

    def segment(self, image: np.ndarray, instruction: str) -> Any:
        """Find what the instruction names.

        Args:
            image: uint8 (height, width, 3), RGB, as displayed.
            instruction: in words.

        Returns:
            Masks, or a pair of masks and confidences. Masks are (K, height, width), or K arrays of
            (height, width): bool, or 0 and 1; K = 0, or empty masks, where nothing matches.
            Confidences are K numbers in [0, 1].
        """


def judge(
    model: Segmenter,
    data: str | Path,
    split: str,
    *,
    name: str | None = None,
    threshold: float = 0.0,
    layout: str | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    control: str | None = None,
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge a model of your own as ``segcompass eval`` judges ours.

    Args:
        model: has a method ``segment(image, instruction)``, see ``Segmenter``.
        data: folder of the data set.
        split: train, val, test, testA or testB.
        name: tells the model from others; rows in ``out`` are taken over from an earlier run of the
            same name, so change it with the weights. By default the name of its class.
        threshold: confidence above which a mask counts.
        layout: how the data lies on disk; None finds out.
        limit: only the first so many samples; None takes all.
        out: folder for rows and figures; None keeps nothing.
        control: see ``segcompass.evaluation.benchmark.evaluate``.
        skip_broken: name the samples that cannot be read or judged, and judge the rest.
        progress: called with (samples done, samples in all).

    Returns:
        The figures of ``segcompass eval --json``.

    Raises:
        DataError: as of ``evaluate``, or the model returned something else than masks.
    """
    part = Split.read(Path(data), split, layout=layout, limit=limit, skip_broken=skip_broken)
    answerer = _OneByOne(model, name or type(model).__qualname__, threshold)
    folder = None if out is None else Path(out)
    return measure(answerer, part, out=folder, batch_size=1, control=control, progress=progress)


@dataclass(frozen=True)
class _OneByOne:
    """Someone's model as a giver of answers."""

    model: Segmenter
    name: str
    threshold: float

    @property
    def settings(self) -> dict[str, Any]:
        return {"model": self.name, "threshold": self.threshold}

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> Answer:
        image = question.picture()
        began = time.perf_counter()
        found = self.model.segment(image, question.instruction)
        seconds = time.perf_counter() - began
        try:
            slots, confidences = found if isinstance(found, tuple) else (found, None)
            return Answer.of_masks(
                _rles(slots, question.sample.image_hw),
                confidences,
                threshold=self.threshold,
                seconds=seconds,
            )
        except (ValueError, TypeError) as error:
            about = f"{self.name}.segment, sample {question.sample.sample_id}"
            raise DataError(f"{about}: {error}") from error


def _rles(found: Any, hw: tuple[int, int]) -> list[Rle]:
    """The masks that a model returned, checked."""
    arrays = [np.asarray(mask) for mask in found]
    for mask in arrays:
        if mask.shape != hw:
            raise ValueError(f"a mask has the picture's (height, width) {hw}, found {mask.shape}")
        if mask.dtype != np.bool_ and not np.isin(mask, (0, 1)).all():
            raise ValueError("a mask is bool, or 0 and 1; apply your threshold to logits first")
    return [masks.encode(mask.astype(bool)) for mask in arrays]
