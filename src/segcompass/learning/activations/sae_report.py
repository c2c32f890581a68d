"""How good a sparse autoencoder is, on sequences it was not trained on.

Explained variance and L0 tell how it reconstructs; the loss recovered, whether the policy can go on
with the reconstruction; the shares of text-only, image-only and shared latents, whether concepts
reach across modalities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder
from segcompass.learning.activations.latents import MODALITIES, modality_of
from segcompass.learning.activations.sources import pixels_of
from segcompass.learning.activations.stream import Group, StateReader, Statistics
from segcompass.learning.engine.distributed import World
from segcompass.reasoning.policy import Policy
from segcompass.reasoning.sequences import Sequences
from segcompass.types import TokenKind

SHARED = 0.05  # a latent is shared if its weaker modality has at least this part of its firing rate
_PASSES = ("original", "reconstructed", "zero")
_LOGIT_ROWS = 1024


@torch.no_grad()
def measure_fidelity(
    policy: Policy,
    sae: SparseAutoencoder,
    reader: StateReader,
    groups: Sequence[Group],
    found: Statistics,
    outliers: float | None,
    world: World,
) -> dict[str, Any]:
    """Run the groups through policy and SAE, three passes each.

    Args:
        policy: Frozen.
        sae: For the policy's own scale.
        reader: Makes sequences of the groups.
        groups: Held-out ones; they are divided among the ranks.
        found: What says which states are outliers. Those are neither encoded nor spliced.
        outliers: In median norms; None counts none as such.
        world: Whose ranks take part.
    """
    meter = _Meter(sae, policy.width)
    for group in world.slice(groups):
        sequences, rows = reader.batch(group)
        if not rows:
            continue
        visuals = pixels_of(rows)
        states, hidden = policy(sequences, visuals)
        readable = reader.readable(sequences, states)
        z = states.sae_states[readable].float()
        usual = found.is_usual(z, outliers)
        rebuilt = meter.count(z, usual, modality_of(states.token_kinds[readable]))
        spliced = readable.clone()
        spliced[readable] = usual
        stand_ins = {"reconstructed": rebuilt[usual], "zero": torch.zeros_like(rebuilt[usual])}
        meter.add_loss("original", _losses(policy, sequences, hidden))
        for name, stand_in in stand_ins.items():
            with policy.spliced(partial(_replaced, where=spliced, values=stand_in)):
                _, hidden = policy(sequences, visuals)
            meter.add_loss(name, _losses(policy, sequences, hidden))
    return meter.report(world)


def _replaced(states: Tensor, where: Bool[Tensor, "B L"], values: Float[Tensor, "n D"]) -> Tensor:
    states = states.clone()
    states[where] = values.to(states.dtype)
    return states


def _losses(
    policy: Policy, sequences: Sequences, hidden: Float[Tensor, "B L D"]
) -> Float[Tensor, "n"]:
    """Cross-entropy of every answer token; in sequences without an answer, of every text token."""
    told = sequences.kinds >= TokenKind.THOUGHT
    silent = ~told.any(1, keepdim=True)
    told |= silent & (sequences.kinds == TokenKind.INSTRUCTION)
    targets = sequences.ids[:, 1:][told[:, 1:]]
    states = hidden[:, :-1][told[:, 1:]]
    parts = [
        F.cross_entropy(policy.language_logits(h).float(), t, reduction="none")
        for h, t in zip(
            torch.split(states, _LOGIT_ROWS), torch.split(targets, _LOGIT_ROWS), strict=True
        )
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0).float()


class _Meter:
    """Sums that can be added up over groups and ranks, in float64."""

    def __init__(self, sae: SparseAutoencoder, width: int) -> None:
        self.sae = sae
        self.fired = torch.zeros(len(MODALITIES), sae.config.d_sae, dtype=torch.float64)
        self.tokens = torch.zeros(len(MODALITIES), dtype=torch.float64)
        # For usual tokens and for all: count, squared error, squared norm, sum of states.
        self.moments = torch.zeros(2, 3 + width, dtype=torch.float64)
        self.losses = torch.zeros(len(_PASSES), 2, dtype=torch.float64)

    def count(
        self, z: Float[Tensor, "n D"], usual: Bool[Tensor, "n"], modality: Tensor
    ) -> Float[Tensor, "n D"]:
        """Take in some tokens; returns their reconstructions."""
        codes = self.sae.encode_sparse(z.to(self.sae.W_enc))
        rebuilt = self.sae.decode_sparse(codes).float()
        error = (z - rebuilt).double().square().sum(-1)
        for row, chosen in enumerate((usual, torch.ones_like(usual))):
            x = z[chosen].double()
            sums = [chosen.sum().double(), error[chosen].sum(), x.square().sum()]
            self.moments[row] += torch.cat([torch.stack(sums), x.sum(0)]).cpu()
        width = self.sae.config.d_sae
        kept = usual[codes.rows]
        place = modality[codes.rows[kept]] * width + codes.columns[kept]
        fired = torch.bincount(place, minlength=self.fired.numel()).view(self.fired.shape)
        self.fired += fired.double().cpu()
        self.tokens += torch.bincount(modality[usual], minlength=len(MODALITIES)).double().cpu()
        return rebuilt

    def add_loss(self, name: str, losses: Tensor) -> None:
        """Take in the losses of one of the three passes."""
        sums = torch.tensor([float(losses.double().sum()), len(losses)], dtype=torch.float64)
        self.losses[_PASSES.index(name)] += sums

    def report(self, world: World) -> dict[str, Any]:
        """All ranks' figures."""
        fired, tokens, moments, losses = (
            world.sum(part.to(world.device)).cpu()
            for part in (self.fired, self.tokens, self.moments, self.losses)
        )
        rates = fired / tokens.clamp_min(1)[:, None]
        l0 = {f"l0_{name}": float(rate.sum()) for name, rate in zip(MODALITIES, rates, strict=True)}
        loss = dict(zip(_PASSES, (losses[:, 0] / losses[:, 1]).tolist(), strict=True))
        gap = loss["zero"] - loss["original"]
        return {
            "tokens": int(moments[1, 0]),
            "outliers": 1 - _ratio(moments[0, 0], moments[1, 0]),
            "explained_variance": _explained(moments[0]),
            "explained_variance_with_outliers": _explained(moments[1]),
            "l0": _ratio(fired.sum(), tokens.sum()),
            **l0,
            "silent": float((fired.sum(0) == 0).double().mean()),
            "loss": {name: _finite(value) for name, value in loss.items()},
            "loss_recovered": _finite((loss["zero"] - loss["reconstructed"]) / gap if gap else 0.0),
            **_shares(rates),
        }


def _explained(moments: Tensor) -> float:
    count, error, square = moments[:3]
    variance = square - moments[3:].square().sum() / count.clamp_min(1)
    return 1 - _ratio(error, variance)


def _shares(rates: Float[Tensor, "2 S"]) -> dict[str, float]:
    """Of the latents that fire at all: which only on text, only on pictures, on both."""
    strong, weak = rates.max(0).values, rates.min(0).values
    living = strong > 0
    shared = living & (weak >= SHARED * strong)
    only = [living & ~shared & (rates[m] > rates[1 - m]) for m in range(len(MODALITIES))]
    count = living.sum()
    named = {
        f"{name}_only": _ratio(o.sum(), count) for name, o in zip(MODALITIES, only, strict=True)
    }
    return {**named, "shared": _ratio(shared.sum(), count)}


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if float(whole) else 0.0


def _finite(value: float) -> float | None:
    """JSON has no NaN: a loss over nothing is null."""
    return value if value == value and abs(value) != float("inf") else None


_ROWS = {
    "explained_variance": "explained variance",
    "explained_variance_with_outliers": "  with outliers",
    "l0": "L0, active latents a token",
    "l0_text": "  on text",
    "l0_image": "  on pictures",
    "dead": "dead latents, share",
    "silent": "  silent on held-out tokens",
    "loss_recovered": "loss recovered when spliced in",
    "text_only": "latents on text only, share",
    "image_only": "  on pictures only",
    "shared": "  on both",
}


def as_table(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    lines = [f"sparse autoencoder on {report['tokens']} held-out tokens"]
    for key, title in _ROWS.items():
        value = report.get(key)
        lines.append(f"  {title:34} {'-' if value is None else format(value, '8.3f')}")
    return "\n".join(lines)
