"""The one training loop: resumable to the bit, stopped between steps, with a JSONL log.

Every step is a pure function of (weights, optimizer state, step number): batches and randomness
are derived from the step, so a run that was killed and resumed equals one that was not. Under
torchrun all ranks run it side by side: they stop, fail and save together, and rank 0 keeps the log.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segcompass.io.errors import CheckpointError, ConfigError, SegCompassError
from segcompass.io.progress import Update, progress, summary
from segcompass.learning.engine.distributed import World
from segcompass.learning.engine.optimizer import MasterWeights, OptimizerConfig
from segcompass.learning.engine.states import (
    SavedState,
    StateError,
    kept_state,
    latest_state,
    write_state,
)

Losses = dict[str, Tensor]  # "loss" is what is minimised, the rest is logged
Step = Callable[[int], Losses | Iterable[Losses]]  # of a step's number; several: micro-batches
Row = dict[str, float | int | None]
Observer = Callable[[int, Row], None]  # gets the step's number and what was logged of it

_COUNTS = ("samples", "answers", "tokens")  # of a rank's slice; logged as their sum over ranks
_PATIENCE = 5.0  # s; torchrun passes a Ctrl-C on to processes that have got it already


class DivergenceError(SegCompassError, FloatingPointError):
    """Loss or gradients are no longer finite."""


def batch_indices(step: int, batch: int, count: int, seed: int) -> list[int]:
    """Sample numbers of a step: every epoch is a new permutation, no sample is dropped."""
    positions = np.arange(step * batch, (step + 1) * batch)
    indices = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(positions // count):
        order = np.random.default_rng((seed, int(epoch))).permutation(count)
        chosen = positions // count == epoch
        indices[chosen] = order[positions[chosen] % count]
    return [int(i) for i in indices]


def grouped_indices(
    step: int, batch: int, lengths: Sequence[int], group: int, seed: int
) -> list[int]:
    """Like :func:`batch_indices`, with samples of about one length together.

    ``group`` batches are drawn as one, sorted by length, cut up and shuffled: less padding.
    """
    drawn = batch_indices(step // group, batch * group, len(lengths), seed)
    drawn.sort(key=lambda i: (lengths[i], i))
    order = np.random.default_rng((seed, step // group, 1)).permutation(group)
    start = int(order[step % group]) * batch
    return drawn[start : start + batch]


class Loop:
    """Runs one stage of training.

    Args:
        folder: Where log and state of this stage are written; seen by all ranks.
        title: Shown with the progress bar.
        parts: Trained modules by name, frozen where they are not to learn, sharded or replicated.
        config: Optimizer and schedule; its batch is that of all ranks together.
        seed: Of everything random in a step.
        multipliers: Learning-rate factors by part.
        world: All ranks; by default those that were started.
        observers: Called on rank 0 after every step; others wait meanwhile, so a sharded policy
            cannot be run there. One that raises a SegCompassError stops the run.

    Raises:
        ConfigError: if there are more ranks than samples in a batch.
    """

    def __init__(
        self,
        folder: Path,
        title: str,
        parts: Mapping[str, nn.Module],
        config: OptimizerConfig,
        seed: int,
        multipliers: Mapping[str, float] | None = None,
        *,
        world: World | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.folder, self.title, self.config, self.seed = folder, title, config, seed
        self.world = World.current() if world is None else world
        if config.batch < self.world.size:
            raise ConfigError(
                f"{title}: a batch of {config.batch} cannot be spread over {self.world.size} "
                "processes; raise `batch`, or start fewer"
            )
        self.observers = observers
        self.weights = MasterWeights(parts, config, multipliers, self.world)
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def _log_path(self) -> Path:
        return self.folder / "log.jsonl"

    def resume(self) -> bool:
        """Continue from the saved state, if there is one, whatever number of ranks wrote it.

        Raises:
            CheckpointError: if the state is damaged, or of a model with other parts.
        """
        error, found = None, False
        try:
            found = self._restore()
        except CheckpointError as caught:
            error = caught
        self.world.agree(error)
        steps = self.world.gather_objects(self.step)
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"{self.folder} holds states of different steps for different processes "
                f"({steps}); put it where all of them see the same files"
            )
        return found

    def _restore(self) -> bool:
        path = latest_state(self.folder)
        if path is None:
            return False
        with SavedState(path) as state:
            self.weights.check(state.shapes, path)
            self.weights.restore({k: state.read(k, self.weights.rows(k)) for k in state.shapes})
            self.step = state.step
        return True

    def save(self) -> None:
        """Write the state in one move, so that a kill never leaves half of one.

        Raises:
            StateError: if that fails, on the disk's account; the last state is kept.
        """
        tensors = self.weights.state()
        starts = {k: rows[0] for k in tensors if (rows := self.weights.rows(k))}
        write_state(self.folder, self.step, tensors, starts, self.world)

    def run(self, losses: Step) -> None:
        """Minimise ``losses(step)["loss"]`` until the last step.

        Ctrl-C and SIGTERM finish the step, save, and stop. An error leaves the last saved state
        as it is: from there the same steps are taken again.

        Args:
            losses: Of this rank's slice of the batch, divided so that their mean over ranks is the
                whole batch's (:meth:`World.means`). What is logged is averaged over ranks, but
                for the counts "samples", "answers" and "tokens", which are summed. Micro-batches
                are as many on every rank, and hold shares (:meth:`World.shares`): the next one is
                asked for when the gradients of the last one are there, and all of them are summed.

        Raises:
            KeyboardInterrupt: after Ctrl-C or SIGTERM, on any rank.
            DivergenceError: if the loss or its gradient is not finite.
            StateError: if state or log cannot be written.
            SegCompassError: what an observer raised; the state is saved before.
        """
        if self.step >= self.config.steps:
            return
        if self.world.is_main:
            self._trim_log()
        total = self.config.steps
        with self._bar() as update, _Stop(_PATIENCE if self.world.size > 1 else 0.0) as stop:
            while self.step < total:
                row = self._one_step(losses)
                error = self._tell(row, update) if self.world.is_main else None
                # Asked once: a signal may come while the state is being saved.
                ends = self.world.gather_objects((stop.asked, error is not None))
                asked, failed = (any(column) for column in zip(*ends, strict=True))
                due = self.step == total or self.step % self.config.save_every == 0
                if asked or failed or due:
                    self.save()
                if failed:
                    self.world.agree(error)
                if asked:
                    raise KeyboardInterrupt

    @contextmanager
    def _bar(self) -> Iterator[Update]:
        if self.world.is_main:
            with progress(self.title) as update:
                yield update
        else:
            yield lambda done, total, note="": None

    def _one_step(self, losses: Step) -> Row:
        started = time.perf_counter()
        # Ranks draw differently, rank 0 as one process alone would. Seeds count in 32 bits.
        torch.manual_seed(self.seed * 1_000_003 + self.step + self.world.rank * 0x9E37_79B1)
        values = self._accumulate(losses(self.step))
        norm = self.weights.step(self.step)
        self._check("gradient norm", norm)
        self.step += 1
        rows = self.world.gather_objects(values)
        figures = {
            key: sum(int(row.get(key, 0)) for row in rows) if key in _COUNTS else _mean(rows, key)
            for key in dict.fromkeys(key for row in rows for key in row)
        }
        seconds = round(time.perf_counter() - started, 3)
        return {"step": self.step, **figures, "norm": round(norm, 4), "s": seconds}

    def _accumulate(self, parts: Losses | Iterable[Losses]) -> dict[str, float]:
        """Go backward through each micro-batch; returns the sums of what they tell."""
        values: dict[str, float] = {}
        several: Iterable[Losses] = [parts] if isinstance(parts, dict) else parts
        for part in several:
            loss = part["loss"]
            # On all ranks at once, or those that are well would wait for the others' gradients.
            self._check("loss", self.world.sum(float(loss.detach())) / self.world.size)
            loss.backward()  # type: ignore[no-untyped-call]
            self.weights.collect()
            for key, value in part.items():
                values[key] = values.get(key, 0.0) + float(value.detach())
        return values

    def _tell(self, row: Row, update: Update) -> SegCompassError | None:
        """Log a step and show it around; returns the reason to stop, if there is one."""
        update(self.step, self.config.steps, summary(row))
        try:
            with self._log_path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            for observer in self.observers:
                observer(self.step, row)
        except SegCompassError as error:
            return error
        except OSError as error:
            return StateError(f"{self._log_path}: {error}; make room and go on with --resume")
        return None

    def _check(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise DivergenceError(
                f"{self.title}: the {name} became {value} at step {self.step}; "
                f"{kept_state(self.folder)}; lower the learning rate and go on from there"
            )

    def _trim_log(self) -> None:
        """Drop rows of steps that will be taken again, and a row that was cut off."""
        if not self._log_path.exists():
            return
        lines = self._log_path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if (step := _step_of(line)) and step <= self.step]
        partial = self._log_path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self._log_path)


def _mean(rows: Sequence[Mapping[str, float]], key: str) -> float | None:
    """Over the ranks that have the figure; what has none (the accuracy over nothing) is null."""
    found = [row[key] for row in rows if key in row and math.isfinite(row[key])]
    return round(sum(found) / len(found), 5) if found else None  # JSON has no NaN


def _step_of(line: str) -> int | None:
    """The step a log row tells of; None where the row is not whole."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None


class _Stop:
    """Makes Ctrl-C and SIGTERM wait for the end of a step; a second Ctrl-C does not wait.

    One that comes within ``patience`` seconds is taken for an echo of the first.
    """

    def __init__(self, patience: float) -> None:
        self.asked = False
        self.patience, self.since = patience, 0.0
        self.former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():  # others get no signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self.former[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self.since = True, now
        elif now - self.since >= self.patience:
            raise KeyboardInterrupt
