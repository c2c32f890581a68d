"""Masks from heatmaps, or from points, boxes and masks, with SAM's prompt encoder and decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import SamModel
from transformers.models.sam.configuration_sam import (
    SamMaskDecoderConfig,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from segcompass.geometry import Frame, padding_mask
from segcompass.grounding.prompted_decoder import PromptedDecoder, check_prompts

PADDING_LOGIT = -50.0  # what the mask prompt says where there is no image

Select = tuple[Int[Tensor, " M"], Int[Tensor, " M"]]


class MaskDecoder(PromptedDecoder):
    """Decode one mask for each slot from its heatmap (Eq. 3).

    Source: Eq. 3; three convolutional blocks (SAM's mask-prompt path) and SAM's two-way
    transformer. The confidences of Eq. 3 do not enter here: they decide which masks count.

    The module borrows ``sam``'s prompt encoder, mask decoder and positional embedding: training
    it trains ``sam``, and ``sam.save_pretrained`` writes a plain Hugging Face folder. As in SAM,
    the random positional frequencies are not trained.
    """

    def __init__(self, sam: SamModel) -> None:
        """Take the parts of ``sam``; raises ValueError when their widths disagree."""
        super().__init__()
        vision = cast(SamVisionConfig, sam.config.vision_config)
        prompt = cast(SamPromptEncoderConfig, sam.config.prompt_encoder_config)
        decoder = cast(SamMaskDecoderConfig, sam.config.mask_decoder_config)
        widths = {
            "vision_config.output_channels": vision.output_channels,
            "2 * vision_config.num_pos_feats": 2 * vision.num_pos_feats,
            "prompt_encoder_config.hidden_size": prompt.hidden_size,
            "mask_decoder_config.hidden_size": decoder.hidden_size,
        }
        if len(set(widths.values())) != 1:
            raise ValueError(f"the segmenter's widths must all be equal, got {widths}")
        sizes = (vision.image_size, vision.patch_size)
        if sizes != (prompt.image_size, prompt.patch_size):
            raise ValueError(
                f"vision_config has (image_size, patch_size) {sizes}, prompt_encoder_config "
                f"{(prompt.image_size, prompt.patch_size)}; give both the same"
            )
        self.prompt_encoder = sam.prompt_encoder
        self.mask_decoder = sam.mask_decoder
        self.shared_image_embedding = sam.shared_image_embedding
        self.shared_image_embedding.requires_grad_(False)
        self.grid: int = prompt.image_embedding_size
        self.channels = vision.output_channels

    @property
    def mask_side(self) -> int:
        """Side of mask prompts and of the decoded low-resolution masks, 4h."""
        return 4 * self.grid

    def forward(
        self,
        keys: Float[Tensor, "B C h w"],
        heatmap_logits: Float[Tensor, "B K h w"],
        *,
        frames: Sequence[Frame] | None = None,
        select: Select | None = None,
    ) -> Float[Tensor, "*slots 4h 4w"]:
        """Decode slots into mask logits over the square frame.

        Args:
            keys: image keys.
            heatmap_logits: one map for each slot, from the slot mapper.
            frames: of the B images; where given, the prompt is -50 on their padding.
            select: (batch indices, slot indices) of the M slots to decode; all where omitted.

        Returns:
            (B, K, 4h, 4w), or (M, 4h, 4w) with ``select``, in the order of ``select``.

        Raises:
            ValueError: When sizes disagree.
        """
        self._check_keys(keys)
        batch, slots = heatmap_logits.shape[:2]
        if batch != keys.shape[0] or (frames is not None and len(frames) != batch):
            raise ValueError(
                f"keys of {keys.shape[0]} images, heatmaps of {batch}, "
                f"frames of {'-' if frames is None else len(frames)}: they must agree"
            )
        if select is None:
            rows = torch.arange(batch, device=keys.device).repeat_interleave(slots)
            chosen = heatmap_logits.flatten(0, 1)
        else:
            rows, chosen = select[0].to(keys.device), heatmap_logits[select]
        prompts = self.mask_prompts(chosen)
        if frames is not None:
            padding = padding_mask(frames, self.mask_side, keys.device)
            prompts = prompts.masked_fill(padding[rows], PADDING_LOGIT)
        logits, _ = self._decode(keys, rows, None, self.embed_masks(prompts))
        return logits.view(batch, slots, *logits.shape[1:]) if select is None else logits

    def mask_prompts(self, maps: Float[Tensor, "M h w"]) -> Float[Tensor, "M 4h 4w"]:
        """Resample maps (heatmap logits) to the size of the prompt encoder's mask input."""
        side = self.mask_side
        if maps.shape[0] == 0:  # interpolate refuses empty batches
            return maps.new_zeros((0, side, side))
        resized = F.interpolate(maps[:, None], (side, side), mode="bilinear", align_corners=False)
        return resized[:, 0]

    def embed_masks(self, masks: Float[Tensor, "M 4h 4w"]) -> Float[Tensor, "M C h w"]:
        """Embed mask prompts with SAM's three convolutional blocks."""
        if masks.shape[-2:] != (self.mask_side, self.mask_side):
            raise ValueError(
                f"mask prompts must be {self.mask_side} px a side, got {tuple(masks.shape)}"
            )
        embedded: Tensor = self.prompt_encoder.mask_embed(masks[:, None])
        return embedded

    def rated_prompts(
        self,
        keys: Float[Tensor, "B C h w"],
        rows: Int[Tensor, " M"],
        *,
        points: Float[Tensor, "M n 2"] | None = None,
        labels: Int[Tensor, "M n"] | None = None,
        boxes: Float[Tensor, "M 4"] | None = None,
        masks: Float[Tensor, "M 4h 4w"] | None = None,
        best_of_three: bool = False,
    ) -> tuple[Float[Tensor, "M 4h 4w"], Float[Tensor, " M"]]:
        """As of `PromptedDecoder`; the estimate is a regression and may lie outside [0, 1].

        Args:
            keys: image keys.
            rows: which image of the batch each of the M prompts is for.
            points: (x, y) in px of the frame.
            labels: 1 object, 0 background, -10 ignored; all 1 where omitted.
            boxes: x0 y0 x1 y1 in px of the frame.
            masks: logits over the frame.
            best_of_three: keep the best-rated of SAM's three alternatives.

        Raises:
            ValueError: When no prompt is given or sizes disagree.
        """
        self._check_keys(keys)
        check_prompts(rows, points=points, boxes=boxes, masks=masks, labels=labels)
        if points is not None and labels is None:
            labels = torch.ones(points.shape[:2], dtype=torch.long, device=points.device)
        sparse, dense = self.prompt_encoder(
            input_points=None if points is None else points[:, None],
            input_labels=None if labels is None else labels[:, None],
            input_boxes=None if boxes is None else boxes[:, None],
            input_masks=None,
        )
        if masks is not None:
            dense = self.embed_masks(masks)
        return self._decode(keys, rows, sparse, dense, best_of_three=best_of_three)

    def decode_queries(
        self,
        keys: Float[Tensor, "B C h w"],
        queries: Float[Tensor, "B K C"],
        *,
        select: Select | None = None,
    ) -> Float[Tensor, "*slots 4h 4w"]:
        """Decode masks from queries that stand where embedded points or boxes would.

        Args:
            keys: image keys.
            queries: sparse prompts, one for each mask.
            select: (batch indices, slot indices) of the M slots to decode; all where omitted.
        """
        self._check_keys(keys)
        batch, slots = queries.shape[:2]
        if select is None:
            rows = torch.arange(batch, device=keys.device).repeat_interleave(slots)
            chosen = queries.flatten(0, 1)
        else:
            rows, chosen = select[0].to(keys.device), queries[select]
        nothing = self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        dense = nothing.expand(len(rows), -1, self.grid, self.grid)
        logits, _ = self._decode(keys, rows, chosen[:, None, None], dense)
        return logits.view(batch, slots, *logits.shape[1:]) if select is None else logits

    def _decode(
        self,
        keys: Float[Tensor, "B C h w"],
        rows: Int[Tensor, " M"],
        sparse: Float[Tensor, "M 1 n C"] | None,
        dense: Float[Tensor, "M C h w"],
        *,
        best_of_three: bool = False,
    ) -> tuple[Float[Tensor, "M 4h 4w"], Float[Tensor, " M"]]:
        """Run the two-way decoder with one prompt a row, gathering each prompt's image once."""
        if len(rows) == 0:  # stay attached to the graph: sums of nothing have zero gradients
            nothing = dense.sum() + keys.sum() * 0
            return nothing.expand(0, self.mask_side, self.mask_side), nothing.expand(0)
        logits, iou = self.mask_decoder(
            image_embeddings=keys[rows],
            image_positional_embeddings=self._positions(),  # one for all: it broadcasts
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=best_of_three,
        )
        best = iou[:, 0].argmax(-1) if best_of_three else torch.zeros_like(rows)
        chosen = (torch.arange(len(rows), device=keys.device), 0, best)
        return logits[chosen], iou[chosen]

    def _positions(self) -> Float[Tensor, "1 C h w"]:
        """Positional embedding of the grid's cell centres, as SamModel computes it."""
        weight = self.shared_image_embedding.positional_embedding
        centres = (
            torch.arange(self.grid, device=weight.device, dtype=weight.dtype) + 0.5
        ) / self.grid
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        embedded: Tensor = self.shared_image_embedding(torch.stack([x, y], dim=-1))
        return embedded.permute(2, 0, 1)[None]

    def _check_keys(self, keys: Tensor) -> None:
        expected = (self.channels, self.grid, self.grid)
        if keys.ndim != 4 or tuple(keys.shape[1:]) != expected:
            raise ValueError(f"expected image keys (B, *{expected}), got {tuple(keys.shape)}")
