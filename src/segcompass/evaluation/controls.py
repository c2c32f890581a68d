"""Control inputs: pictures and questions that do not belong together, so that a model must fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from segcompass.evaluation.answers import Question
from segcompass.io.errors import DataError
from segcompass.types import Sample

CONTROLS = ("shuffle-questions", "shuffle-images")


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
