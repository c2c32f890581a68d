"""Sample panels: every so many steps, what the model answers now, as one PNG to look at."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from segcompass.data.samples import read_dataset
from segcompass.io.errors import DataError, SegCompassError
from segcompass.io.files import bytes_of, write_whole
from segcompass.io.masks import decode
from segcompass.io.sheets import Entry, sheet
from segcompass.learning.config import DataConfig
from segcompass.learning.rollouts import evaluating
from segcompass.pipeline import SegCompass
from segcompass.types import Sample

T = TypeVar("T")
PANEL_SAMPLES = 4
_LOOKED_AT = 64  # samples among which those of a panel are chosen
logger = logging.getLogger(__name__)


class Panels:
    """Draws FOLDER/panels/step-000200.png: what the model answers after 200 steps.

    Nothing of training changes: modes and random numbers are put back, no gradient is kept. Where
    the policy is sharded, all ranks have to draw (they generate together); one of them writes.

    Args:
        folder: Of the stage.
        model: The parts as they are trained.
        samples: What is asked, the same every time.
        every: Steps from one panel to the next.
        writes: Whether this rank writes the picture.
    """

    def __init__(
        self,
        folder: Path,
        model: SegCompass,
        samples: Sequence[Sample],
        every: int,
        *,
        writes: bool = True,
    ) -> None:
        self.folder, self.model, self.samples = folder / "panels", model, list(samples)
        self.every, self.writes, self.failed = every, writes, False

    def before(self, losses: Callable[[int], T]) -> Callable[[int], T]:
        """The same losses, with a panel drawn before a step that is due."""

        def drawn_first(step: int) -> T:
            self(step)
            return losses(step)

        return drawn_first

    def __call__(self, step: int) -> None:
        """Draw a panel if it is due; one that fails is no reason to stop training."""
        if step % self.every or not self.samples:
            return
        try:
            self.draw(step)
        except (SegCompassError, OSError, ValueError) as error:
            if not self.failed:
                logger.warning("no sample panel at step %d: %s; training goes on", step, error)
            self.failed = True

    def draw(self, step: int) -> Path:
        """Predict with the weights as they are, and write the panel in one move."""
        with untouched(self.model):
            predictions = self.model.predict_batch(
                [s.image_path for s in self.samples],
                [s.instruction for s in self.samples],
                force_format=False,  # what training sees
            )
        path = self.folder / f"step-{step:06d}.png"
        if self.writes:
            pairs = zip(predictions, self.samples, strict=True)
            page = sheet(
                [Entry(p, _targets(s)) for p, s in pairs],
                f"{self.folder.parent.name}, step {step:,}",
            )
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, bytes_of(lambda file: page.save(file, format="PNG")))
        return path


def panel_samples(data: DataConfig, count: int = PANEL_SAMPLES) -> list[Sample]:
    """Samples to look at, always the same: of the validation split, else of the training split.

    They are of different pictures, and of different kinds as far as there are kinds.
    """
    for split in ("val", data.split):
        try:
            samples = read_dataset(data.root, split, layout=data.layout, limit=_LOOKED_AT)
        except DataError:  # not every set has one, and training does not need it
            continue
        return choose(samples, count)
    return []


def choose(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Samples of different pictures: one of each kind first, then any."""
    chosen: dict[Path, Sample] = {}
    for any_kind in (False, True):
        for sample in samples:
            fits = any_kind or sample.kind not in {s.kind for s in chosen.values()}
            if len(chosen) < count and fits and sample.image_path not in chosen:
                chosen[sample.image_path] = sample
    return list(chosen.values())


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, and every mode and random state afterwards as it was."""
    gpus = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with evaluating(model), torch.random.fork_rng(gpus):
        yield


def _targets(sample: Sample) -> np.ndarray:
    if not sample.targets:
        return np.zeros((0, *sample.image_hw), dtype=bool)
    return np.stack([decode(rle) for rle in sample.targets])
