"""What an answer earns: for its form and for its masks (B.3), weighted as in Table 6.

Both scores are in [0, 1] and need no gradient. A malformed or unfinished answer earns nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from segcompass.reasoning.prompts import THINK_CLOSE, THINK_OPEN, Prompt

LONG_THOUGHT = 2048  # characters
_CLEAN, _UNTIDY, _INVALID = 1.0, 0.9, 0.0


class RewardConfig(BaseModel, frozen=True, extra="forbid"):
    """How the two scores are made and weighted."""

    format: float = Field(0.3, ge=0, description="weight of the form")
    mask: float = Field(0.7, ge=0, description="weight of the masks")
    single: Literal["soft_iou", "blend"] = Field(
        "soft_iou",
        description="for one target: soft IoU, or 0.5 soft IoU + 0.2 soft dice + 0.3 hard IoU",
    )
    several: Literal["size", "matched"] = Field(
        "size",
        description="for several: sum over pairs / max(found, wanted), or B.3's mean over pairs",
    )
    threshold: float = Field(0.5, ge=0, le=1, description="confidence above which a mask counts")


def format_score(prompt: Prompt, generated: Sequence[int]) -> float:
    """Form of an answer: 1 clean, 0.9 untidy, 0 invalid.

    Source: B.3's five cases, with K concentration tokens in a row where the paper has one. Valid is
    one think block that holds text, followed by the K tokens. Untidy is a thought of more than
    2,048 characters, or text before, between or after the two. An answer that was cut off at the
    token limit is invalid: the policy has to learn to end.

    Args:
        prompt: Knows the marks and the concentration tokens; tokens are compared by id.
        generated: The answer's ids with its end-of-text, if it came to that.
    """
    ids = list(generated)
    if not ids or ids[-1] != prompt.eos_token_id:
        return _INVALID
    ids = ids[:-1]
    at = prompt.find_slots(ids)
    if at is None:
        return _INVALID
    before = prompt.decode(ids[:at])
    after = prompt.decode(ids[at + len(prompt.slot_ids) :])
    text = before + after
    if text.count(THINK_OPEN) != 1 or text.count(THINK_CLOSE) != 1:
        return _INVALID
    lead, _, rest = before.partition(THINK_OPEN)
    thought, closed, between = rest.partition(THINK_CLOSE)
    if not closed or not thought.strip():
        return _INVALID
    untidy = len(thought) > LONG_THOUGHT or (lead + between + after).strip()
    return _UNTIDY if untidy else _CLEAN


@torch.no_grad()
def mask_score(
    logits: Float[Tensor, "M h w"], targets: Float[Tensor, "N h w"], config: RewardConfig
) -> float:
    """How well the masks that count cover the targets, in [0, 1].

    Source: B.3. Nothing wanted and nothing found is 1; only one of the two is 0. For one target
    the found masks act together, as they do when the answer is judged.

    Args:
        logits: Mask logits of the slots whose confidence is above the threshold.
        targets: Area coverage of the wanted instances, at the same resolution.
        config: Which variant.
    """
    if len(logits) == 0 or len(targets) == 0:
        return float(len(logits) == len(targets))
    found, wanted = logits.float().sigmoid().flatten(1), targets.float().flatten(1)
    if len(wanted) == 1:
        return _one(found.amax(0), wanted[0], config)
    overlap = found @ wanted.T
    ious = overlap / (found.sum(1)[:, None] + wanted.sum(1)[None] - overlap).clamp_min(1e-6)
    rows, columns = linear_sum_assignment(ious.cpu().numpy(), maximize=True)
    total = float(ious[torch.as_tensor(rows), torch.as_tensor(columns)].sum())
    return total / (len(rows) if config.several == "matched" else max(ious.shape))


def _one(found: Float[Tensor, "n"], wanted: Float[Tensor, "n"], config: RewardConfig) -> float:
    overlap, total = (found * wanted).sum(), found.sum() + wanted.sum()
    soft_iou = overlap / (total - overlap).clamp_min(1e-6)
    if config.single == "soft_iou":
        return float(soft_iou)
    hard, truth = found > 0.5, wanted > 0.5
    hard_iou = (hard & truth).sum() / (hard | truth).sum().clamp_min(1)
    return float(0.5 * soft_iou + 0.2 * 2 * overlap / total.clamp_min(1e-6) + 0.3 * hard_iou)
