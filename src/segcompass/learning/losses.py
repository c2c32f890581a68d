"""The supervised losses of Eq. 6, each defined once.

Targets are area coverages in [0, 1] on the grid at hand, so the same functions serve heatmaps and
low-resolution masks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def dice_loss(
    logits: Float[Tensor, "M h w"], targets: Float[Tensor, "M h w"]
) -> Float[Tensor, "M"]:
    """One minus the soft dice coefficient of each mask, smoothed by one cell.

    Source: V-net's dice, as L_dice in Sec. 3.3.
    """
    probability = logits.sigmoid().flatten(1)
    target = targets.flatten(1)
    overlap = (probability * target).sum(-1)
    return 1 - (2 * overlap + 1) / (probability.sum(-1) + target.sum(-1) + 1)


def map_bce(logits: Float[Tensor, "M h w"], targets: Float[Tensor, "M h w"]) -> Float[Tensor, "M"]:
    """Binary cross-entropy of each map, mean over cells."""
    cells = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return cells.flatten(1).mean(-1)


def focal_loss(
    logits: Float[Tensor, "M h w"], targets: Float[Tensor, "M h w"], gamma: float = 2.0
) -> Float[Tensor, "M"]:
    """Cross-entropy of each map with its easy cells held down, mean over cells.

    Source: the focal loss of RetinaNet, without its class weight.
    """
    cells = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    missed = (logits.sigmoid() - targets).abs()
    return (cells * missed**gamma).flatten(1).mean(-1)


def confidence_bce(
    logits: Float[Tensor, "B K"], matched: Float[Tensor, "B K"]
) -> Float[Tensor, "B*K"]:
    """L_conf of Eq. 6: every slot against whether it was matched."""
    return F.binary_cross_entropy_with_logits(logits, matched, reduction="none").flatten()


def pairwise_dice(
    logits: Float[Tensor, "K h w"], targets: Float[Tensor, "N h w"]
) -> Float[Tensor, "K N"]:
    """Dice loss of every slot against every target."""
    probability, target = logits.sigmoid().flatten(1), targets.flatten(1)
    overlap = probability @ target.T
    total = probability.sum(-1)[:, None] + target.sum(-1)[None]
    return 1 - (2 * overlap + 1) / (total + 1)


def soft_iou(logits: Float[Tensor, "M h w"], targets: Float[Tensor, "M h w"]) -> Float[Tensor, "M"]:
    """Soft intersection over union of each mask; 1 where both are empty."""
    probability, target = logits.sigmoid().flatten(1), targets.flatten(1)
    overlap = (probability * target).sum(-1)
    union = probability.sum(-1) + target.sum(-1) - overlap
    return torch.where(union > 0, overlap / union.clamp_min(1e-6), torch.ones_like(union))
