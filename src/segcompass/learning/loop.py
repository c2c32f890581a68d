"""The one training loop: resumable to the bit, stopped between steps, with a JSONL log.

Every step is a pure function of (weights, optimizer state, step number): batches and randomness
are derived from the step, so a run that was killed and resumed equals one that was not.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from segcompass.io.errors import CheckpointError, SegCompassError
from segcompass.io.progress import progress
from segcompass.learning.optimizer import MasterWeights, OptimizerConfig

Losses = dict[str, Tensor]  # "loss" is what is minimised, the rest is logged


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
        folder: Where log and state of this stage are written.
        title: Shown with the progress bar.
        parts: Trained modules by name.
        config: Optimizer and schedule.
        seed: Of everything random in a step.
        multipliers: Learning-rate factors by part.
    """

    def __init__(
        self,
        folder: Path,
        title: str,
        parts: Mapping[str, nn.Module],
        config: OptimizerConfig,
        seed: int,
        multipliers: Mapping[str, float] | None = None,
    ) -> None:
        self.folder, self.title, self.config, self.seed = folder, title, config, seed
        self.weights = MasterWeights(parts, config, multipliers)
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def _state_path(self) -> Path:
        return self.folder / "state.safetensors"

    @property
    def _log_path(self) -> Path:
        return self.folder / "log.jsonl"

    def resume(self) -> bool:
        """Continue from the saved state, if there is one.

        Raises:
            CheckpointError: if the state is damaged, or of a model with other parts.
        """
        path = self._state_path
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                step = int((file.metadata() or {})["step"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path} is no training state or damaged ({error}); delete it to start anew"
            ) from error
        self.weights.restore(tensors, path)
        self.step = step
        return True

    def save(self) -> None:
        """Write the state in one move, so that a kill never leaves half a file."""
        partial = self._state_path.with_suffix(".partial")
        save_file(self.weights.tensors(), partial, metadata={"step": str(self.step)})
        partial.replace(self._state_path)

    def run(self, losses: Callable[[int], Losses]) -> None:
        """Minimise ``losses(step)["loss"]`` until the last step.

        Ctrl-C and SIGTERM finish the step, save, and stop. An error leaves the last saved state
        as it is: from there the same steps are taken again.

        Raises:
            KeyboardInterrupt: after Ctrl-C or SIGTERM.
            DivergenceError: if the loss or its gradient is not finite.
        """
        if self.step >= self.config.steps:
            return
        self._trim_log()
        total = self.config.steps
        with (
            self._log_path.open("a", encoding="utf-8") as log,
            progress(self.title) as update,
            _Stop() as stop,
        ):
            while self.step < total:
                row = self._one_step(losses)
                log.write(json.dumps(row) + "\n")
                log.flush()
                update(self.step, total, f"loss {row['loss']:.4f}")
                asked = stop.asked  # once: it may change while the state is being saved
                last = self.step == total
                if asked or last or self.step % self.config.save_every == 0:
                    self.save()
                if asked:
                    raise KeyboardInterrupt

    def _one_step(self, losses: Callable[[int], Losses]) -> dict[str, float | int | None]:
        started = time.perf_counter()
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        values = losses(self.step)
        loss = values["loss"]
        self._check("loss", float(loss.detach()))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = self.weights.step(self.step)
        self._check("gradient norm", norm)
        self.step += 1
        seconds = time.perf_counter() - started
        numbers = {key: _number(value) for key, value in values.items()}
        return {"step": self.step, **numbers, "norm": round(norm, 4), "s": round(seconds, 3)}

    def _check(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            path = self._state_path
            kept = f"the last good state is {path}" if path.exists() else "no state was saved yet"
            raise DivergenceError(
                f"{self.title}: the {name} became {value} at step {self.step}; {kept}; "
                "lower the learning rate and go on from there"
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


def _number(value: Tensor) -> float | None:
    """For the log; what has no value (the accuracy over nothing) is null, for JSON has no NaN."""
    number = round(float(value.detach()), 5)
    return number if math.isfinite(number) else None


def _step_of(line: str) -> int | None:
    """The step a log row tells of; None where the row is not whole."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None


class _Stop:
    """Makes Ctrl-C and SIGTERM wait for the end of a step; a second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.asked = False
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
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
