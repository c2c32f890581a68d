"""Group relative policy optimisation (Eq. 10, 11): from rewards to a loss on the policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from segcompass.reasoning.policy import Policy

_CHUNK = 1024  # positions whose logits are alive at once


class GrpoConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of Eq. 10."""

    clip: float = Field(0.2, gt=0, lt=1, description="epsilon")
    kl: float = Field(0.2, ge=0, description="beta; 0 spares the reference policy")
    ratio: Literal["token", "sequence"] = Field(
        "token", description="of each token, or of the whole answer as Eq. 10 is written"
    )


class GrpoLoss(NamedTuple):
    """Of every answer; their mean over all answers is the loss."""

    loss: Float[Tensor, "B"]  # minus Eq. 10
    kl: Float[Tensor, "B"]  # Eq. 11, mean over the answer's tokens
    clipped: Float[Tensor, "B"]  # share of ratios that the clip held back


def advantages(rewards: Float[Tensor, "n G"]) -> Float[Tensor, "n G"]:
    """Rewards against their own group: (r - mean) / std over the group's G answers.

    A group whose answers all earn the same has nothing to teach: its advantages are 0.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1, keepdim=True, correction=0)
    return torch.where(spread > 1e-6, centred / spread.clamp_min(1e-6), 0.0)


def grpo_loss(
    new: Float[Tensor, "B T"],
    old: Float[Tensor, "B T"],
    reference: Float[Tensor, "B T"] | None,
    mask: Bool[Tensor, "B T"],
    advantage: Float[Tensor, "B"],
    config: GrpoConfig,
) -> GrpoLoss:
    """The clipped surrogate of Eq. 10 and its k3 penalty (Eq. 11), for each answer.

    Args:
        new: Log-probabilities of the answers' tokens under the policy that is trained.
        old: Under the policy that wrote them.
        reference: Under the frozen reference; None leaves the penalty out.
        mask: Which positions are an answer's tokens; every answer has one at least.
        advantage: Of each answer.
        config: Clip, penalty and kind of ratio. The penalty is per token with either ratio: the
            k3 estimate of a whole answer overflows as soon as the policies part.
    """
    log_ratio = torch.where(mask, new - old, 0.0)
    if config.ratio == "sequence":
        ratio = log_ratio.sum(1, keepdim=True).exp()
        counted = torch.ones_like(ratio)
    else:
        ratio, counted = log_ratio.exp(), mask.to(new.dtype)
    gain = advantage[:, None]
    held = ratio.clamp(1 - config.clip, 1 + config.clip)
    surrogate = torch.minimum(ratio * gain, held * gain)
    clipped = (held * gain < ratio * gain).to(new.dtype)
    tokens = mask.to(new.dtype)
    if reference is None:
        kl = torch.zeros_like(advantage)
    else:
        behind = torch.where(mask, reference - new, 0.0)
        kl = _row_mean(behind.exp() - behind - 1, tokens)
    loss = config.kl * kl - _row_mean(surrogate, counted)
    return GrpoLoss(loss, kl.detach(), _row_mean(clipped, counted).detach())


def _row_mean(values: Float[Tensor, "B T"], weights: Float[Tensor, "B T"]) -> Float[Tensor, "B"]:
    return (values * weights).sum(1) / weights.sum(1).clamp_min(1)


def answer_log_probs(
    policy: Policy,
    hidden: Float[Tensor, "B L D"],
    ids: Int[Tensor, "B L"],
    mask: Bool[Tensor, "B L"],
    temperature: float = 1.0,
) -> Float[Tensor, "B L"]:
    """Log-probability of every answer token given what stands before it; 0 elsewhere.

    Rollout, reference and training use this one function, so their ratios compare like with like:
    same temperature, and the tokens that sampling forbids have no probability.

    Args:
        policy: Its language head turns states into logits.
        hidden: Final states; position t tells of token t + 1.
        ids: The tokens.
        mask: Which tokens are an answer's.
        temperature: That the answers were sampled with.
    """
    before = hidden[:, : ids.shape[1] - 1][mask[:, 1:]]
    targets = ids[:, 1:][mask[:, 1:]]

    def some(states: Tensor, wanted: Tensor) -> tuple[Tensor]:
        logits = policy.language_logits(states).float() / temperature
        logits[:, policy.backbone.placeholder_ids] = -torch.inf
        return (logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1),)

    (found,) = in_chunks(some, before, targets)
    result = before.new_zeros(mask.shape, dtype=torch.float32)
    result[:, 1:][mask[:, 1:]] = found
    return result


def in_chunks(
    judge: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    states: Float[Tensor, "n D"],
    targets: Int[Tensor, "n"],
) -> tuple[Tensor, ...]:
    """What ``judge`` says of n states and the tokens that follow them, one row for each.

    The logits that it makes live for a chunk of positions only, and are made again for the
    backward pass: all of a batch at once would be gigabytes.
    """
    chunks = zip(torch.split(states, _CHUNK), torch.split(targets, _CHUNK), strict=True)
    parts = [checkpoint(judge, *chunk, use_reentrant=False) for chunk in chunks]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
