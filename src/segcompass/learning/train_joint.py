"""Joint training: segmentation and confidence losses through slots, concepts and policy (Eq. 6).

Frozen: the segmenter's image encoder (its keys are computed once), the SAE, and the policy up to
the SAE layer, so that what the SAE reads does not drift. One policy pass gives the states of the
SAE layer, the concentration tokens and the answer's log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from segcompass.geometry import Frame, padding_mask
from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.interfaces.concept_slots import ConceptSlots
from segcompass.io.images import load_image
from segcompass.learning.config import JointStage, RunConfig
from segcompass.learning.corpus import (
    BlockMemo,
    encode_answers,
    feature_memo,
    read_samples,
    target_grid,
    visual_memo,
)
from segcompass.learning.loop import Loop, Losses, grouped_indices
from segcompass.learning.losses import confidence_bce, dice_loss, map_bce
from segcompass.learning.matching import Matches, match
from segcompass.learning.train_warmup import answer_loss
from segcompass.reasoning.policy import Policy
from segcompass.types import Sample, Slots


def train_joint(
    policy: Policy,
    encoder: ImageEncoder,
    interface: ConceptSlots,
    config: RunConfig,
    stage: JointStage,
    folder: Path,
) -> None:
    """Train everything after the SAE layer on masks; see `JointStage` for the weights."""
    samples = read_samples(config.data)[: stage.samples]
    paths = [s.image_path for s in samples]
    place = PlaceHead(policy.width)
    trained = {**freeze(policy, encoder, interface, stage), "place": place}
    loop = Loop(folder, "joint", trained, stage, config.seed, stage.multipliers.model_dump())
    loop.resume()
    visuals = visual_memo(policy.backbone)
    features, keys = feature_memo(policy.backbone, visuals, paths), key_memo(encoder, paths)
    lengths = [len(s.thought or "") + len(s.instruction) for s in samples]

    def losses(step: int) -> Losses:
        chosen = grouped_indices(step, stage.batch, lengths, stage.group, config.seed)
        batch = [samples[i] for i in chosen]
        pictures, sequences = encode_answers(policy, batch, visuals)
        seen = [features(s.image_path) for s in batch]
        states, hidden = policy(sequences, pictures, seen)
        stacked = torch.stack([keys(s.image_path).float() for s in batch])
        frames = [Frame.fit(s.image_hw, encoder.side) for s in batch]
        padding = padding_mask(frames, encoder.grid)
        alignment = interface.align(states, stacked, padding=padding)
        result, matches = segmentation_losses(
            interface, stacked, alignment.slots, batch, frames, stage
        )
        if stage.place_weight > 0 and len(matches.images):
            where = place.loss(alignment.queries[matches.images, matches.slots], matches.targets)
            result["loss"] = result["loss"] + stage.place_weight * where
            result["place"] = where.detach()
        with torch.set_grad_enabled(stage.language_weight > 0):
            language, _ = answer_loss(policy, sequences, hidden)
        if stage.language_weight > 0:
            result["loss"] = result["loss"] + stage.language_weight * language
        return {**result, "language": language.detach()}

    loop.run(losses)


def segmentation_losses(
    interface: ConceptSlots,
    keys: Float[Tensor, "B C h w"],
    slots: Slots,
    batch: list[Sample],
    frames: list[Frame],
    stage: JointStage,
) -> tuple[Losses, Matches]:
    """L_seg and L_conf of Eq. 6 on matched slots, and how good the matched masks are.

    Only matched slots are decoded. Slots of pictures without a target learn to be unsure.
    """
    side, grid = frames[0].side, keys.shape[-1]
    coarse = [target_grid(s.targets, s.image_hw, side, grid) for s in batch]
    fine = [target_grid(s.targets, s.image_hw, side, 4 * grid) for s in batch]
    matches = match(slots.heatmap_logits, slots.confidence_logits, coarse, order=stage.order_weight)
    matched = torch.zeros_like(slots.confidence_logits)
    matched[matches.images, matches.slots] = 1.0
    confidence = confidence_bce(slots.confidence_logits, matched)
    result = {"loss": stage.conf_weight * confidence, "confidence": confidence.detach()}
    if len(matches.images) == 0:
        return result, matches
    chosen = (matches.images, matches.slots)
    heatmaps = slots.heatmap_logits[chosen]
    logits = interface.decode(keys, slots, frames=frames, select=chosen)
    rows = zip(matches.images.tolist(), matches.indices.tolist(), strict=True)
    targets = torch.stack([fine[image][index] for image, index in rows])
    bce = map_bce(heatmaps, matches.targets).mean()
    sketch = dice_loss(heatmaps, matches.targets).mean()
    dice = dice_loss(logits, targets).mean()
    segmentation = bce + stage.heatmap_dice_weight * sketch + stage.dice_weight * dice
    figures = {
        "loss": result["loss"] + stage.seg_weight * segmentation,
        "confidence": confidence.detach(),
        "heatmap_bce": bce.detach(),
        "heatmap_dice": sketch.detach(),
        "dice": dice.detach(),
        "iou": _iou(logits > 0, targets > 0.5).mean(),
    }
    return figures, matches


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

    def loss(
        self, queries: Float[Tensor, "M D"], targets: Float[Tensor, "M h w"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy of the bins that hold the targets' centres of mass."""
        mass = targets.flatten(1).sum(-1).clamp_min(1e-6)
        scale = torch.linspace(0, self.BINS, targets.shape[-1] + 1)[:-1].to(targets)
        scale = scale + self.BINS / targets.shape[-1] / 2  # centres of cells, in bins
        rows = (targets.sum(2) @ scale / mass).long().clamp_max(self.BINS - 1)
        columns = (targets.sum(1) @ scale / mass).long().clamp_max(self.BINS - 1)
        by_row = F.cross_entropy(self.rows(queries), rows)
        return by_row + F.cross_entropy(self.columns(queries), columns)


def freeze(
    policy: Policy, encoder: ImageEncoder, interface: ConceptSlots, stage: JointStage
) -> dict[str, nn.Module]:
    """Freeze what this stage leaves alone; returns the trained parts by name."""
    policy.requires_grad_(False)
    encoder.requires_grad_(False)
    interface.sae.requires_grad_(False)
    parts: dict[str, nn.Module] = {
        "codebook": interface.codebook,
        "head": nn.ModuleList([interface.fusion, interface.mapper]),
        "decoder": interface.decoder,
    }
    if stage.train_upper_layers:
        upper = nn.ModuleList(policy.backbone.layers[policy.config.sae_layer + 1 :])
        parts["policy"] = nn.ModuleList([upper, policy.backbone.final_norm]).requires_grad_(True)
    return parts


def key_memo(encoder: ImageEncoder, paths: Iterable[Path]) -> BlockMemo[Tensor]:
    """Image keys of the frozen encoder, (C, h, w) for every picture, in half precision."""

    @torch.no_grad()
    def make(block: list[Path]) -> list[Tensor]:
        pixels, _ = encoder.preprocess([load_image(path) for path in block])
        return [keys.bfloat16().clone() for keys in encoder(pixels)]

    return BlockMemo(make, paths)
