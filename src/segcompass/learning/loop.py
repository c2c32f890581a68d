"""The one training loop: resumable to the bit, fp32 master weights, one-cycle schedule, JSONL log.

Every step is a pure function of (weights, optimizer state, step number): batches and randomness
are derived from the step, so a run that was killed and resumed equals one that was not.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from segcompass.io.errors import CheckpointError

Losses = dict[str, Tensor]  # "loss" is what is minimised, the rest is logged


class OptimizerConfig(BaseModel, frozen=True, extra="forbid"):
    """AdamW under a one-cycle schedule."""

    steps: int = Field(ge=1)
    batch: int = Field(32, ge=1, description="samples of one step")
    learning_rate: float = Field(gt=0)
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps with a rising rate")
    final_division: float = Field(20.0, ge=1, description="last rate = learning_rate / this")
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0, description="largest gradient norm, over all parts together")
    betas: tuple[float, float] = (0.9, 0.98)
    save_every: int = Field(200, ge=1)


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The rate at ``step``: linear rise, then a cosine down to ``learning_rate/final_division``."""
    rise = config.warmup * config.steps
    if step < rise:
        return config.learning_rate * (step + 1) / rise
    done = min(1.0, (step - rise) / max(1.0, config.steps - rise))
    low = config.learning_rate / config.final_division
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * done))


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


class MasterWeights:
    """fp32 copies of the trained parameters, updated by AdamW and written back.

    With bf16 weights alone, small updates are rounded away; parameters that are fp32 already are
    their own master.

    Args:
        parts: Trained modules by name.
        multipliers: Learning-rate factor of each part; 1 where it is missing.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        config: OptimizerConfig,
        multipliers: Mapping[str, float] | None = None,
    ) -> None:
        self.config = config
        self.working: dict[str, nn.Parameter] = {}
        self.master: dict[str, Tensor] = {}
        groups = []
        for part, module in parts.items():
            names = []
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    key = f"{part}.{name}"
                    names.append(key)
                    self.working[key] = parameter
                    self.master[key] = self._master_of(parameter)
            factor = (multipliers or {}).get(part, 1.0)
            groups += self._groups(names, factor)
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)

    @staticmethod
    def _master_of(parameter: nn.Parameter) -> Tensor:
        if parameter.dtype == torch.float32:
            return parameter
        return parameter.detach().float().clone().requires_grad_(True)

    def _groups(self, names: list[str], factor: float) -> list[dict[str, object]]:
        """Matrices decay, vectors do not."""
        groups: list[dict[str, object]] = []
        for decays in (True, False):
            chosen = [self.master[n] for n in names if (self.master[n].ndim >= 2) == decays]
            if chosen:
                decay = self.config.weight_decay if decays else 0.0
                groups.append({"params": chosen, "factor": factor, "weight_decay": decay})
        return groups

    def step(self, step: int) -> float:
        """Clip, update and write back; returns the gradient norm before clipping."""
        for name, parameter in self.working.items():
            master = self.master[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        norm = nn.utils.clip_grad_norm_(list(self.master.values()), self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step) * group["factor"]
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.working.items():
                parameter.copy_(self.master[name])
                parameter.grad = None
        return float(norm)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs."""
        state = {f"master/{name}": tensor.detach() for name, tensor in self.master.items()}
        for name, tensor in self.master.items():
            for key, value in self.optimizer.state.get(tensor, {}).items():
                state[f"{key}/{name}"] = value.detach()
        return {key: value.contiguous().clone() for key, value in state.items()}

    def restore(self, tensors: Mapping[str, Tensor], source: Path) -> None:
        """Take up saved tensors; raises CheckpointError unless they are exactly these parts'."""
        found = {k.removeprefix("master/") for k in tensors if k.startswith("master/")}
        if found != set(self.master):
            odd = sorted(found.symmetric_difference(self.master))[:3]
            raise CheckpointError(
                f"{source} belongs to another run: it differs in {', '.join(odd)}; "
                "delete it to start anew, or resume with the config that wrote it"
            )
        with torch.no_grad():
            for name, tensor in self.master.items():
                tensor.copy_(tensors[f"master/{name}"])
                self.working[name].copy_(tensor)
                keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in tensors]
                self.optimizer.state[tensor] = {k: tensors[f"{k}/{name}"].clone() for k in keys}


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

    def resume(self) -> bool:
        """Continue from the saved state, if there is one."""
        if not self._state_path.exists():
            return False
        with safe_open(self._state_path, framework="pt") as file:
            step = int(file.metadata()["step"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.weights.restore(tensors, self._state_path)
        self.step = step
        return True

    def save(self) -> None:
        """Write the state in one move, so that a kill never leaves half a file."""
        partial = self._state_path.with_suffix(".partial")
        save_file(self.weights.tensors(), partial, metadata={"step": str(self.step)})
        os.replace(partial, self._state_path)

    def run(self, losses: Callable[[int], Losses]) -> None:
        """Minimise ``losses(step)["loss"]`` until the last step; Ctrl-C saves."""
        if self.step >= self.config.steps:
            return
        with (self.folder / "log.jsonl").open("a") as log, self._progress() as update:
            try:
                while self.step < self.config.steps:
                    row = self._one_step(losses)
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    update(row)
                    if self.step % self.config.save_every == 0:
                        self.save()
            finally:
                self.save()

    def _one_step(self, losses: Callable[[int], Losses]) -> dict[str, float | int]:
        started = time.perf_counter()
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        values = losses(self.step)
        loss = values["loss"]
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"{self.title}: the loss became {float(loss)} at step {self.step}; the last good "
                f"state is {self._state_path}; lower the learning rate and resume"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        norm = self.weights.step(self.step)
        self.step += 1
        seconds = time.perf_counter() - started
        numbers = {key: round(float(value.detach()), 5) for key, value in values.items()}
        return {"step": self.step, **numbers, "norm": round(norm, 4), "s": round(seconds, 3)}

    def _progress(self) -> _Bar:
        return _Bar(self.title, self.step, self.config.steps)


class _Bar:
    """A progress bar on stderr that is silent when nobody watches."""

    def __init__(self, title: str, done: int, total: int) -> None:
        console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> Callable[[Mapping[str, float | int]], None]:
        self.progress.start()
        return self._update

    def __exit__(self, *_error: object) -> None:
        self.progress.stop()

    def _update(self, row: Mapping[str, float | int]) -> None:
        note = f"loss {row['loss']:.4f}"
        self.progress.update(self.task, completed=int(row["step"]), note=note)
