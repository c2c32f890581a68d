"""How trained weights move: AdamW on fp32 masters, under a one-cycle schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from segcompass.io.errors import CheckpointError


class OptimizerConfig(BaseModel, frozen=True, extra="forbid"):
    """AdamW under a one-cycle schedule."""

    steps: int = Field(ge=1)
    batch: int = Field(32, ge=1, description="samples of one step")
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
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
        """Clip, update and write back; returns the gradient norm before clipping.

        Where that is not finite, every weight keeps its value.
        """
        for name, parameter in self.working.items():
            master = self.master[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        norm = nn.utils.clip_grad_norm_(list(self.master.values()), self.config.clip)
        if not torch.isfinite(norm):
            return float(norm)
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
        prefix = "master/"
        found = {
            k.removeprefix(prefix): t.shape for k, t in tensors.items() if k.startswith(prefix)
        }
        expected = {name: tensor.shape for name, tensor in self.master.items()}
        if found != expected:
            names = sorted({*found, *expected})
            odd = [name for name in names if found.get(name) != expected.get(name)][:3]
            raise CheckpointError(
                f"{source} belongs to another run: it differs in {', '.join(odd)}; "
                "delete it to start anew, or resume with the config that wrote it"
            )
        with torch.no_grad():
            for name, tensor in self.master.items():
                tensor.copy_(tensors[f"master/{name}"])
                self.working[name].copy_(tensor)
                moments = {
                    # Laid out in memory as AdamW itself would, so that rounding is the same.
                    kind: torch.empty_like(tensor).copy_(tensors[f"{kind}/{name}"])
                    for kind in ("exp_avg", "exp_avg_sq")
                    if f"{kind}/{name}" in tensors
                }
                if moments:
                    self.optimizer.state[tensor] = {
                        "step": tensors[f"step/{name}"].clone(),
                        **moments,
                    }
