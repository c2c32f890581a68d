"""The supervised half of Eq. 6: what every slot and every matched mask costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from segcompass.geometry import Frame
from segcompass.interfaces.base import Alignment, Interface
from segcompass.learning.corpus import target_grid
from segcompass.learning.losses import confidence_bce, dice_loss, focal_loss, map_bce
from segcompass.learning.matching import match
from segcompass.types import Sample, given

Terms = dict[str, Tensor]  # values over which a mean is taken, by name
MASK_TERMS = ("mask_bce", "dice", "focal", "iou")  # of matched pairs
HEATMAP_TERMS = ("heatmap_bce", "heatmap_dice")


def segmentation_terms(
    interface: Interface,
    keys: Float[Tensor, "B C h w"],
    alignment: Alignment,
    samples: Sequence[Sample],
    frames: Sequence[Frame],
    *,
    order: float = 0.0,
    place: PlaceHead | None = None,
) -> Terms:
    """Losses on matched slots, the confidences of all slots, and how good matched masks are.

    Only matched slots are decoded. Slots of pictures without a target learn to be unsure. A single
    slot answers for all targets together.

    Returns:
        ``confidence`` of all B·K slots; ``mask_bce``, ``dice``, ``focal`` and ``iou`` of the M
        matched pairs; where there are heatmaps, ``heatmap_bce`` and ``heatmap_dice``; with a place
        head, ``place``.
    """
    confidence, grid = alignment.confidence_logits, keys.shape[-1]
    together = confidence.shape[1] == 1
    asked = [(s, f.side) for s, f in zip(samples, frames, strict=True)]
    coarse = [wanted_maps(s, side, grid, together).to(keys) for s, side in asked]
    fine = [wanted_maps(s, side, 4 * grid, together) for s, side in asked]
    if alignment.slots is None:
        maps = keys.new_zeros(*confidence.shape, grid, grid)  # matched by confidence alone
    else:
        maps = alignment.slots.heatmap_logits
    matches = match(maps, confidence, coarse, order=order)
    matched = torch.zeros_like(confidence)
    matched[matches.images, matches.slots] = 1.0
    chosen = (matches.images, matches.slots)
    logits = interface.decode(keys, alignment, frames=frames, select=chosen)
    pairs = zip(matches.images.tolist(), matches.indices.tolist(), strict=True)
    targets = logits.new_zeros(logits.shape)
    for row, (image, index) in enumerate(pairs):
        targets[row] = fine[image][index]
    terms = {
        "confidence": confidence_bce(confidence, matched),
        "mask_bce": map_bce(logits, targets),
        "dice": dice_loss(logits, targets),
        "focal": focal_loss(logits, targets),
        "iou": _iou(logits.detach() > 0, targets > 0.5),
    }
    if alignment.slots is not None:
        terms["heatmap_bce"] = map_bce(maps[chosen], matches.targets)
        terms["heatmap_dice"] = dice_loss(maps[chosen], matches.targets)
    if place is not None:
        queries = given(alignment.queries, "slot queries, which place_weight reads")
        terms["place"] = place.losses(queries[chosen], matches.targets)
    return terms


def wanted_maps(sample: Sample, side: int, grid: int, together: bool) -> Float[Tensor, "N g g"]:
    """A sample's targets on a grid over the frame; as one target if one slot draws them all."""
    masks = target_grid(sample.targets, sample.image_hw, side, grid)
    return masks.sum(0, keepdim=True).clamp_max(1) if together and len(masks) else masks


def _iou(found: Bool[Tensor, "M h w"], truth: Bool[Tensor, "M h w"]) -> Float[Tensor, "M"]:
    either = (found | truth).flatten(1).sum(-1).clamp_min(1)
    return (found & truth).flatten(1).sum(-1) / either


class PlaceHead(nn.Module):
    """Reads a target's row and column off its slot's query; only while training.

    Maps alone teach this slowly: for long, every slot draws every object. Told the place, queries
    soon carry it in a form that the mapper's positional keys can match.
    """

    BINS = 8

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rows, self.columns = nn.Linear(width, self.BINS), nn.Linear(width, self.BINS)

    def losses(
        self, queries: Float[Tensor, "M D"], targets: Float[Tensor, "M h w"]
    ) -> Float[Tensor, "M"]:
        """Cross-entropy of the bins that hold the targets' centres of mass."""
        mass = targets.flatten(1).sum(-1).clamp_min(1e-6)
        scale = torch.linspace(0, self.BINS, targets.shape[-1] + 1)[:-1].to(targets)
        scale = scale + self.BINS / targets.shape[-1] / 2  # centres of cells, in bins
        rows = (targets.sum(2) @ scale / mass).long().clamp_max(self.BINS - 1)
        columns = (targets.sum(1) @ scale / mass).long().clamp_max(self.BINS - 1)
        by_row = F.cross_entropy(self.rows(queries), rows, reduction="none")
        return by_row + F.cross_entropy(self.columns(queries), columns, reduction="none")
