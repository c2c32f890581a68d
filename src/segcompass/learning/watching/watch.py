"""Who looks at a run: TensorBoard, the health check, sample panels.

The first two are observers of a loop: they are called on rank 0 after every step, with the number
of steps done and the row that was logged. They change nothing of training; the health check may
raise a SegCompassError, and then the run saves its state and ends. Panels are drawn by all ranks
together, before a step, for a sharded policy answers only if all of them ask.
"""

from __future__ import annotations

import logging
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from segcompass.interfaces.candidate_rerank import CandidateRerankConfig
from segcompass.interfaces.registry import find
from segcompass.learning.config import RunConfig
from segcompass.learning.engine.distributed import World
from segcompass.learning.engine.loop import Observer, Row
from segcompass.learning.stages import JointStage
from segcompass.learning.watching.health import Health
from segcompass.learning.watching.panels import Panels, panel_samples
from segcompass.pipeline import SegCompass

logger = logging.getLogger(__name__)


class TensorBoard:
    """Writes every figure as a scalar to FOLDER/tensorboard; without the extra, says so once.

    Steps that a resumed run takes again replace what was written of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tensorboard"
        self.writer: Any = None
        self.off = False

    def __call__(self, step: int, row: Row) -> None:
        """Write a row; JSONL stays the record, so a writer that fails does not stop training."""
        if self.off:
            return
        try:
            if self.writer is None:
                self.writer = self._open(step)
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self.writer.add_scalar(name, value, step)
        except ImportError:
            self.off = True
            _say_missing()
        except (OSError, RuntimeError) as error:  # a full disk ends the writer's own thread
            self.off = True
            logger.warning("%s: %s; figures go to log.jsonl alone", self.folder, error)

    def _open(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.folder), purge_step=step, flush_secs=30)
        weakref.finalize(self, _close, writer)  # also when the process ends
        return writer


def _close(writer: Any) -> None:
    with suppress(OSError):  # on a full disk; that has been said
        writer.close()


@cache
def _say_missing() -> None:
    logger.warning(
        "tensorboard is not installed, figures go to log.jsonl alone; "
        "install it with pip install 'segcompass[track]'"
    )


def stage_observers(config: RunConfig, folder: Path) -> list[Observer]:
    """Observers of any stage."""
    return [TensorBoard(folder)] if config.tensorboard else []


def joint_observers(config: RunConfig, stage: JointStage, folder: Path) -> list[Observer]:
    """Observers of the joint stage: those of any stage, and the health check."""
    learns = stage.rl_weight > 0
    health = Health(folder, stage.health, reward_weights=_weights(config, stage), learns=learns)
    return [*stage_observers(config, folder), health]


def _weights(config: RunConfig, stage: JointStage) -> tuple[float, float] | None:
    """Weights of form and masks; None where answers earn by named objects, a weighted mean."""
    head = config.head
    name = head.interface if isinstance(head, CandidateRerankConfig) else config.interface
    if find(name).form == "objects":
        return None
    return stage.rewards.format, stage.rewards.mask


def joint_panels(
    config: RunConfig, stage: JointStage, folder: Path, model: SegCompass, world: World
) -> Panels | None:
    """Sample panels of the joint stage, if they are asked for."""
    if stage.panel_every is None:
        return None
    samples = panel_samples(config.data)
    return Panels(folder, model, samples, stage.panel_every, writes=world.is_main)
