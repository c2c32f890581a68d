"""A data set in memory and a model that always answers it rightly, for tests of the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from factories import make_prediction
from PIL import Image

from segcompass.data.scenes.grammar import closing
from segcompass.io import masks
from segcompass.types import NamedObject, Prediction, Sample, Status

HW = (20, 30)
OBJECTS = (
    NamedObject(11, "mug", "red", "small", "plain", "b4"),
    NamedObject(12, "hat", "blue", "large", "plain", "f7"),
)


def square(index: int) -> np.ndarray:
    """A 4x4 mask, somewhere else for every index."""
    mask = np.zeros(HW, dtype=bool)
    mask[index : index + 4, 2 * index : 2 * index + 4] = True
    return mask


def make_samples(folder: Path, number: int = 6) -> list[Sample]:
    """Every third sample has no target; the others one square and the red mug."""
    samples = []
    for i in range(number):
        path = folder / f"{i}.png"
        Image.new("RGB", HW[::-1], (i, 0, 0)).save(path)
        found = i % 3 != 2
        samples.append(
            Sample(
                sample_id=f"s{i}",
                image_path=path,
                image_id=i,
                image_hw=HW,
                instruction=f"question {i}",
                targets=(masks.encode(square(i)),) if found else (),
                target_ids=(11,) if found else (),
                kind="spatial" if i < 3 else "geometric",
                objects=OBJECTS,
            )
        )
    return samples


class Oracle:
    """Answers rightly for the pair it is shown: red value and question must name one sample."""

    name = "oracle"
    fingerprint = "0" * 16
    threshold = 0.5

    def __init__(self, samples: Sequence[Sample], die_after: int | None = None) -> None:
        self.samples = samples
        self.die_after = die_after
        self.batches: list[int] = []
        self.options: list[dict[str, Any]] = []

    def predict_batch(
        self, images: Sequence[Any], instructions: Sequence[str], **options: Any
    ) -> list[Prediction]:
        self.options.append(options)
        if self.die_after is not None and len(self.batches) >= self.die_after:
            raise KeyboardInterrupt
        self.batches.append(len(images))
        answers = [self.answer(*pair) for pair in zip(images, instructions, strict=True)]
        return [replace(answer, threshold=options["threshold"]) for answer in answers]

    def predict_paths(self, *given: Any, **options: Any) -> dict[str, list[Prediction]]:
        """Concepts do it all; the tokens alone find nothing."""
        both = self.predict_batch(*given, **options)
        nothing = [prediction(None, p.instruction, threshold=p.threshold) for p in both]
        return {"both": both, "concepts": both, "tokens": nothing}

    def answer(self, image: np.ndarray, instruction: str) -> Prediction:
        index = int(image[0, 0, 0])
        found = bool(self.samples[index].targets) and instruction == f"question {index}"
        return prediction(square(index) if found else None, instruction)


def prediction(mask: np.ndarray | None, instruction: str, **changes: Any) -> Prediction:
    """One accepted slot with ``mask``, or none; the thought says the same."""
    slots = np.zeros((6, *HW), dtype=bool)
    if mask is not None:
        slots[0] = mask
    answer = replace(
        make_prediction(),
        instruction=instruction,
        status=Status.NO_TARGET if mask is None else Status.OK,
        reasoning=closing([] if mask is None else OBJECTS[:1]),
        slot_masks=slots,
        slot_scores=np.array([0.875 if mask is not None else 0.125] + [0.0625] * 5),
        accepted=np.array([mask is not None] + [False] * 5),
    )
    return replace(answer, **changes)


def reader(samples: Sequence[Sample]) -> Callable[..., list[Sample]]:
    """What stands in for ``read_dataset``."""

    def read(root: Path, split: str, *, limit: int | None, **_: Any) -> list[Sample]:
        return list(samples[:limit])

    return read
