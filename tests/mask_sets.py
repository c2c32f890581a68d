"""Small random data sets with answers, for comparing metrics with other formulations of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segcompass.evaluation.scoring import PairScore, score_sample
from segcompass.io import masks
from segcompass.types import Sample, Status

STATUSES = (Status.OK, Status.OK, Status.OK, Status.OK, Status.MALFORMED, Status.TRUNCATED)


@dataclass(frozen=True)
class Answer:
    """One answer with all its masks decoded."""

    name: str
    targets: np.ndarray  # bool (N, H, W); may overlap, may be empty
    slots: np.ndarray  # bool (K, H, W)
    confidences: np.ndarray  # float32 (K,)
    ignore: np.ndarray | None  # bool (H, W)
    status: Status
    instruction: str = "the red mug"
    kind: str | None = None

    @property
    def sample(self) -> Sample:
        """The question, as a reader returns it."""
        return Sample(
            sample_id=self.name,
            image_path=Path(f"{self.name}.png"),
            image_id=0,
            image_hw=self.targets.shape[1:],
            instruction=self.instruction,
            targets=tuple(masks.encode(target) for target in self.targets),
            ignore=None if self.ignore is None else masks.encode(self.ignore),
            kind=self.kind,
        )

    def score(self, threshold: float = 0.5) -> PairScore:
        """Judge it."""
        slots = [masks.encode(slot) for slot in self.slots]
        return score_sample(
            self.sample, slots, self.confidences.tolist(), threshold=threshold, status=self.status
        )


def random_answers(seed: int, *, ties: bool = True) -> list[Answer]:
    """One to six answers; slots are often a target with some pixels changed."""
    rng = np.random.default_rng(seed)
    return [_random_answer(rng, f"s{i}", ties=ties) for i in range(rng.integers(1, 7))]


def _random_answer(rng: np.random.Generator, name: str, *, ties: bool) -> Answer:
    hw = tuple(rng.integers(2, 9, size=2))
    targets = rng.random((rng.integers(0, 4), *hw)) < rng.choice([0.0, 0.2, 0.6])
    slots = rng.random((rng.integers(0, 6), *hw)) < rng.random()
    for slot in slots:
        if len(targets) and rng.random() < 0.7:
            slot[:] = rng.choice(targets) ^ (rng.random(hw) < rng.choice([0.0, 0.1, 0.3]))
    levels = rng.integers(0, 9, size=len(slots)) / 8 if ties else rng.random(len(slots))
    return Answer(
        name=name,
        targets=targets,
        slots=slots,
        confidences=levels.astype(np.float32),
        ignore=rng.random(hw) < rng.random() if rng.random() < 0.3 else None,
        status=STATUSES[rng.integers(len(STATUSES))],
        instruction=" ".join(["word"] * rng.integers(1, 20)),
        kind=rng.choice(["spatial", "geometric"]),
    )
