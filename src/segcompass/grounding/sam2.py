"""SAM 2 behind the methods of SAM's image encoder and mask decoder: a frozen promptable segmenter.

It takes points and boxes, no heatmaps; its keys are several maps, and its frame is the picture
stretched to a square.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Sam2Model

from segcompass.geometry import Frame
from segcompass.grounding.image_encoder import FramedPictures
from segcompass.grounding.prompted_decoder import PromptedDecoder, check_prompts


@dataclass(frozen=True)
class Sam2Keys:
    """Image keys of a batch, finest first; indexed by rows like the single map of SAM."""

    maps: tuple[
        Float[Tensor, "B C/8 4h 4w"], Float[Tensor, "B C/4 2h 2w"], Float[Tensor, "B C h w"]
    ]

    def __len__(self) -> int:
        return len(self.maps[-1])

    def __getitem__(self, rows: Int[Tensor, " M"] | slice) -> Sam2Keys:
        fine, middle, coarse = self.maps
        return Sam2Keys((fine[rows], middle[rows], coarse[rows]))

    @property
    def device(self) -> torch.device:
        return self.maps[-1].device


class Sam2ImageEncoder(FramedPictures):
    """Encode images into keys with SAM 2's Hiera encoder; without gradients."""

    def __init__(self, sam: Sam2Model) -> None:
        side = sam.prompt_encoder.input_image_size
        if not isinstance(side, int):
            raise ValueError(f"the segmenter's frame must be square, got image_size={side}")
        super().__init__(side)
        self.sam = sam

    def frame(self, hw: tuple[int, int]) -> Frame:
        return Frame.stretch(hw, self.side)

    def forward(self, pixels: Float[Tensor, "B 3 side side"]) -> Sam2Keys:
        """Encode preprocessed pixels."""
        fine, middle, coarse = self.sam.get_image_embeddings(pixels)
        return Sam2Keys((fine, middle, coarse))


class Sam2MaskDecoder(PromptedDecoder):
    """Decode masks from points and boxes with SAM 2."""

    def __init__(self, sam: Sam2Model) -> None:
        super().__init__()
        self.sam = sam

    @property
    def mask_side(self) -> int:
        """Side of the decoded low-resolution masks, 4h."""
        return int(self.sam.prompt_encoder.mask_input_size[0])

    def rated_prompts(
        self,
        keys: Sam2Keys,
        rows: Int[Tensor, " M"],
        *,
        points: Float[Tensor, "M n 2"] | None = None,
        labels: Int[Tensor, "M n"] | None = None,
        boxes: Float[Tensor, "M 4"] | None = None,
        best_of_three: bool = False,
    ) -> tuple[Float[Tensor, "M 4h 4w"], Float[Tensor, " M"]]:
        """As of `PromptedDecoder`; the IoU lies in [0, 1].

        With ``best_of_three=False`` the mask is SAM 2's own choice: in place of an unstable single
        one, the best of three.
        """
        check_prompts(rows, points=points, boxes=boxes, labels=labels)
        if len(rows) == 0:
            empty = keys.maps[-1].new_zeros(0)
            return empty.view(0, self.mask_side, self.mask_side), empty
        output = self.sam(
            image_embeddings=list(keys[rows].maps),
            input_points=None if points is None else points[:, None],
            input_labels=None if labels is None else labels[:, None],
            input_boxes=None if boxes is None else boxes[:, None],
            multimask_output=best_of_three,
        )
        logits, iou = output.pred_masks[:, 0], output.iou_scores[:, 0]  # (M, 1 or 3, …)
        chosen = (torch.arange(len(rows), device=logits.device), iou.argmax(-1))
        return logits[chosen], iou[chosen]
