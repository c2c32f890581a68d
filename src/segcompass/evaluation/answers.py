"""What is judged of an answer, whoever gave it, and the row that it leaves in ``samples.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from segcompass.data.scenes.grammar import resolve
from segcompass.evaluation.candidates import Weighed
from segcompass.evaluation.scoring import PairScore, score_sample
from segcompass.io import masks
from segcompass.io.errors import DataError
from segcompass.io.images import load_image
from segcompass.types import Prediction, Rle, Sample, Status


@dataclass(frozen=True)
class Question:
    """What a model is given for a sample: its own picture and words, or a control's."""

    sample: Sample
    image_path: Path
    instruction: str

    def picture(self) -> UInt8[np.ndarray, "H W 3"]:
        """The picture to show, of the size that the sample's target has.

        Raises:
            ImageError: it cannot be read.
            DataError: the sample's own picture is of another size than the data set says.
        """
        image = load_image(self.image_path)
        height, width = self.sample.image_hw
        if image.shape[:2] == (height, width):
            return image
        if self.image_path == self.sample.image_path:
            raise DataError(
                f"{self.image_path}: is {image.shape[1]}x{image.shape[0]} px, the data set says "
                f"{width}x{height}; fetch the original picture"
            )
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class Answer:
    """Masks of instances with their confidences, and how the answer ended."""

    slots: tuple[Rle, ...]  # accepted or not, at the picture's own size
    confidences: tuple[float, ...]  # one for each slot, in [0, 1]
    threshold: float  # slots above it count
    status: Status
    text: str = ""
    thought: str | None = None  # None: there is none to judge
    seconds: float | None = None
    weighed: Weighed | None = None  # against what it was chosen from
    alone: Mapping[str, Answer] = field(default_factory=dict)  # along one path, by its name

    @classmethod
    def of(cls, prediction: Prediction, weighed: Weighed | None = None) -> Answer:
        """The answer of our own models."""
        return cls(
            slots=tuple(masks.encode(mask) for mask in prediction.slot_masks),
            confidences=tuple(prediction.slot_scores.tolist()),
            threshold=prediction.threshold,
            status=prediction.status,
            text=prediction.text,
            thought=prediction.reasoning,
            seconds=sum(prediction.timings.values()),
            weighed=weighed,
        )

    @classmethod
    def of_masks(
        cls,
        slots: Sequence[Rle],
        confidences: Sequence[float] | None = None,
        *,
        threshold: float = 0.0,
        status: Status | None = None,
        seconds: float | None = None,
    ) -> Answer:
        """The answer of a model that says nothing but masks.

        Args:
            slots: one mask per instance; none where nothing matches.
            confidences: of the masks, in [0, 1]; None makes all of them certain.
            threshold: confidence above which a mask counts.
            status: how the answer ended; by default well-formed.
            seconds: that it took.

        Raises:
            ValueError: counts that differ, or a confidence outside [0, 1].
        """
        sure = [1.0] * len(slots) if confidences is None else [float(c) for c in confidences]
        if len(sure) != len(slots):
            raise ValueError(f"{len(slots)} masks, but {len(sure)} confidences")
        if not all(0 <= confidence <= 1 for confidence in sure):
            raise ValueError(f"a confidence lies in [0, 1], found {sure}")
        found = any(confidence > threshold for confidence in sure)
        ended = status or (Status.OK if found else Status.NO_TARGET)
        return cls(tuple(slots), tuple(sure), threshold, ended, seconds=seconds)

    @property
    def well_formed(self) -> bool:
        """Whether masks may be read from it."""
        return self.status.well_formed

    @property
    def accepted(self) -> list[int]:
        """The slots that count."""
        if not self.well_formed:
            return []
        return [i for i, confidence in enumerate(self.confidences) if confidence > self.threshold]


def judge_answer(sample: Sample, answer: Answer) -> PairScore:
    """Score an answer against the sample's targets.

    Raises:
        ValueError: a mask has another size than the picture.
    """
    score = score_sample(
        sample,
        answer.slots,
        answer.confidences,
        threshold=answer.threshold,
        status=answer.status,
        reasoning_correct=_names_the_targets(sample, answer),
    )
    alone = {name: judge_answer(sample, other) for name, other in answer.alone.items()}
    paths = {name: (other.intersection, other.union) for name, other in alone.items()}
    return replace(score, paths=paths)


def row_details(question: Question, answer: Answer) -> dict[str, Any]:
    """What the row of an answer holds beside its score."""
    details = {
        "image": str(question.image_path),
        "instruction": question.instruction,
        "text": answer.text,
        "masks": [answer.slots[i] for i in answer.accepted],
        "scores": [answer.confidences[i] for i in answer.accepted],
        "truth": list(question.sample.targets),
        "seconds": None if answer.seconds is None else round(answer.seconds, 6),
    }
    return details if answer.weighed is None else details | {"weighed": answer.weighed._asdict()}


def _names_the_targets(sample: Sample, answer: Answer) -> bool | None:
    """Whether the thought names exactly the targets; None where that cannot be told."""
    if not sample.objects or answer.thought is None:
        return None
    if not answer.well_formed:
        return False
    named = resolve(answer.thought, sample.objects)
    if named is None:
        return False
    return {sample.objects[i].ann_id for i in named} == set(sample.target_ids)
