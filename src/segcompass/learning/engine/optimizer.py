"""How trained weights move: AdamW or Muon on fp32 masters, under a one-cycle schedule.

Sharded parameters (FSDP2) are moved shard by shard, each rank its own; replicated ones alike on
every rank, by the mean of all ranks' gradients.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from segcompass.io.errors import CheckpointError, ConfigError
from segcompass.learning.engine.distributed import World, average_gradients

_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
_TABLE = re.compile(r"embed|lm_head").search  # rows that are looked up, not multiplied through


class OptimizerConfig(BaseModel, frozen=True, extra="forbid"):
    """AdamW or Muon under a one-cycle schedule."""

    steps: int = Field(ge=1)
    batch: int = Field(32, ge=1, description="samples of one step")
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon orthogonalises the updates of matrices; the rest stays on AdamW"
    )
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
        return config.learning_rate * min(1.0, (step + 1) / rise)
    done = min(1.0, (step - rise) / max(1.0, config.steps - 1 - rise))
    low = config.learning_rate / config.final_division
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * done))


class MasterWeights:
    """fp32 copies of the trained parameters, updated by AdamW and written back.

    With bf16 weights alone, small updates are rounded away; parameters that are fp32 already are
    their own master. Of a sharded parameter, the master is this rank's shard.

    Args:
        parts: Trained modules by name.
        multipliers: Learning-rate factor of each part; 1 where it is missing.
        world: All ranks; what they have replicated starts with rank 0's values.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        config: OptimizerConfig,
        multipliers: Mapping[str, float] | None = None,
        world: World | None = None,
    ) -> None:
        self.config = config
        self.world = World.current() if world is None else world
        self.working: dict[str, nn.Parameter] = {}
        self.master: dict[str, Tensor] = {}
        self.starts: dict[str, int] = {}  # first row of this rank's shard, for sharded parameters
        groups = []
        for part, module in parts.items():
            names = []
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    key = f"{part}.{name}"
                    names.append(key)
                    self.working[key] = parameter
                    if isinstance(parameter.data, DTensor):
                        self.starts[key] = first_row(parameter.data)
                    else:
                        self.world.copy_from_main([parameter])
                    self.master[key] = self._master_of(parameter)
            factor = (multipliers or {}).get(part, 1.0)
            groups += self._groups(names, factor)
        self.optimizers = self._optimizers(groups)
        self.optimizer = self.optimizers[-1]  # AdamW

    @staticmethod
    def _master_of(parameter: nn.Parameter) -> Tensor:
        if isinstance(parameter.data, DTensor):
            return (
                local_part(parameter).float().requires_grad_(True)
            )  # shares the memory if it is fp32
        if parameter.dtype == torch.float32:
            return parameter
        return parameter.detach().float().clone().requires_grad_(True)

    def _groups(self, names: list[str], factor: float) -> list[dict[str, Any]]:
        """Matrices decay, vectors do not."""
        groups: list[dict[str, Any]] = []
        for decays in (True, False):
            chosen = [self.master[n] for n in names if (self.master[n].ndim >= 2) == decays]
            if chosen:
                decay = self.config.weight_decay if decays else 0.0
                groups.append({"params": chosen, "factor": factor, "weight_decay": decay})
        return groups

    def _optimizers(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        """AdamW for all, or Muon for the matrices between layers and AdamW for what is left.

        Muon's rates are scaled so that its updates are as large as AdamW's: one rate serves both.
        """
        rate, betas = self.config.learning_rate, self.config.betas
        if self.config.optimizer == "adamw":
            return [torch.optim.AdamW(groups, lr=rate, betas=betas)]
        if self.starts:
            raise ConfigError(
                "muon needs whole matrices, and several ranks share the policy's out; set "
                "optimizer: adamw, or train with one process"
            )
        inner = {id(m) for name, m in self.master.items() if m.ndim == 2 and not _TABLE(name)}
        split: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for group in groups:
            for kind, rows in split.items():
                chosen = [m for m in group["params"] if (id(m) in inner) == kind]
                if chosen:
                    rows.append({**group, "params": chosen})
        muon = torch.optim.Muon(split[True], lr=rate, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(split[False], lr=rate, betas=betas)]

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        """What the optimizers remember of a tensor."""
        found = (optimizer.state.get(master, {}) for optimizer in self.optimizers)
        return {key: value for state in found for key, value in state.items()}

    def step(self, step: int) -> float:
        """Average, clip, update and write back; returns the gradient norm before clipping.

        The norm is that of all parts together, on whatever rank their gradients are. Where it is
        not finite, every weight keeps its value.
        """
        self.collect()
        replicated = [m for name, m in self.master.items() if name not in self.starts]
        average_gradients(replicated, self.world)
        norm = self._norm()
        if not torch.isfinite(norm):
            return float(norm)
        nn.utils.clip_grads_with_norm_(list(self.master.values()), self.config.clip, norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.config, step) * group["factor"]
            optimizer.step()
        self._write_back()
        for master in self.master.values():
            master.grad = None
        return float(norm)

    def collect(self) -> None:
        """Add the gradients of a backward pass to those of the masters, in fp32.

        Several passes before one step are summed here: in bf16, sums would lose the small ones.
        """
        for name, parameter in self.working.items():
            master = self.master[name]
            if master is not parameter and parameter.grad is not None:
                gradient = local_part(parameter.grad).float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    def _norm(self) -> Tensor:
        """Of all gradients; every rank's shards count, and replicas once."""
        found: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, master in self.master.items():
            if master.grad is not None:
                found[name in self.starts].append(master.grad)
        replicated = nn.utils.get_total_norm(found[False])
        if not self.starts:
            return replicated
        sharded = self.world.sum(float(nn.utils.get_total_norm(found[True])) ** 2)
        return torch.tensor((sharded + float(replicated) ** 2) ** 0.5)

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, parameter in self.working.items():
            target = local_part(parameter)
            if target.data_ptr() != self.master[name].data_ptr():
                target.copy_(self.master[name])

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, not copied; of what is sharded, this rank's shards."""
        state = {f"master/{name}": tensor.detach() for name, tensor in self.master.items()}
        for name, tensor in self.master.items():
            for key, value in self._moments(tensor).items():
                state[f"{key}/{name}"] = value.detach()
        return state

    def rows(self, key: str) -> tuple[int, int] | None:
        """This rank's rows of a tensor of :meth:`state`; None where it is not sharded."""
        kind, _, name = key.partition("/")
        start = self.starts.get(name)
        if start is None or kind == "step":
            return None
        return start, start + len(self.master[name])

    def check(self, shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
        """Raises CheckpointError unless these are the shapes of exactly these parts' state."""
        start = len("master/")
        found = {k[start:]: tuple(s) for k, s in shapes.items() if k.startswith("master/")}
        expected = {name: tuple(parameter.shape) for name, parameter in self.working.items()}
        if found != expected:
            names = sorted({*found, *expected})
            odd = [name for name in names if found.get(name) != expected.get(name)][:3]
            raise CheckpointError(
                f"{source} belongs to another run: it differs in {', '.join(odd)}; "
                "delete it to start anew, or resume with the config that wrote it"
            )

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up saved tensors that passed :meth:`check`; of what is sharded, the local rows."""
        for name, tensor in self.master.items():
            tensor.copy_(tensors[f"master/{name}"])
            moments = {
                # Laid out in memory as the optimizer itself would, so that rounding is the same.
                kind: torch.empty_like(tensor).copy_(tensors[f"{kind}/{name}"])
                for kind in _MOMENTS
                if f"{kind}/{name}" in tensors
            }
            if f"step/{name}" in tensors:
                moments["step"] = tensors[f"step/{name}"].clone()
            if moments:
                self._optimizer_of(tensor).state[tensor] = moments
        self._write_back()

    def _optimizer_of(self, master: Tensor) -> torch.optim.Optimizer:
        return next(
            optimizer
            for optimizer in self.optimizers
            if any(master is p for group in optimizer.param_groups for p in group["params"])
        )


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard, in the same memory; the whole tensor where it is not sharded."""
    plain = tensor.detach()
    return plain.to_local() if isinstance(plain, DTensor) else plain


def first_row(tensor: DTensor) -> int:
    """First row of this rank's shard; FSDP2 cuts rows into equal parts, the last ones shorter."""
    assert tensor.placements == (Shard(0),), tensor.placements
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())
    return min(rows * tensor.device_mesh.get_local_rank(), tensor.shape[0])
