"""Which slot is answerable for which target instance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from segcompass.learning.losses import pairwise_dice


class Matches(NamedTuple):
    """M matched pairs of a batch: slot ``slots[m]`` of image ``images[m]`` owns a target."""

    images: Int[Tensor, "M"]
    slots: Int[Tensor, "M"]
    targets: Float[Tensor, "M h w"]  # at the resolution that was matched at
    indices: Int[Tensor, "M"]  # of the target among its image's targets


@torch.no_grad()
def match(
    heatmap_logits: Float[Tensor, "B K h w"],
    confidence_logits: Float[Tensor, "B K"],
    targets: list[Float[Tensor, "N h w"]],
    *,
    order: float = 0.0,
) -> Matches:
    """Assign at most one slot to every target, at least cost.

    Source: bipartite matching of Sec. 3.3. The cost is heatmap dice minus confidence: with the
    maps alone, slots that draw the same target take turns at owning it, and all confidences fall
    to 1/K. Matching on the heatmaps leaves only matched slots to be decoded.

    Args:
        heatmap_logits: Of all slots.
        confidence_logits: Of all slots.
        targets: Coverage maps of each image's instances; more than K leave some unmatched.
        order: Cost of each place that a slot is away from its target's place in the list. A small
            one settles who owns what while all slots still draw alike.
    """
    images, slots, chosen, indices = [], [], [], []
    for image, wanted in enumerate(targets):
        if len(wanted) == 0:
            continue
        cost = pairwise_dice(heatmap_logits[image], wanted)
        cost = cost - confidence_logits[image].sigmoid()[:, None]
        slot_numbers = torch.arange(len(cost), device=cost.device)
        target_numbers = torch.arange(len(wanted), device=cost.device)
        cost = cost + order * (slot_numbers[:, None] - target_numbers[None]).abs()
        cost = cost.nan_to_num()  # the loss will be NaN too, and it is the loop that tells so
        rows, columns = linear_sum_assignment(cost.float().cpu().numpy())
        images += [image] * len(rows)
        slots += rows.tolist()
        indices += columns.tolist()
        chosen.append(wanted[torch.as_tensor(columns, device=wanted.device)])
    device = heatmap_logits.device
    size = heatmap_logits.shape[-2:]
    return Matches(
        torch.tensor(images, dtype=torch.long, device=device),
        torch.tensor(slots, dtype=torch.long, device=device),
        torch.cat(chosen) if chosen else heatmap_logits.new_zeros((0, *size)),
        torch.tensor(indices, dtype=torch.long, device=device),
    )
