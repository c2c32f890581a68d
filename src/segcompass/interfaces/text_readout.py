"""Seg-Zero and VisionReasoner: the answer's text names boxes and points, a frozen SAM draws them.

<answer>[{"bbox_2d": …, "point_2d": …}, …]</answer> -> boxes, points -> best mask of each
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from segcompass.geometry import Canvas, Fit, Frame, boxes_to_frame, points_to_frame
from segcompass.grounding.prompted_decoder import PromptedDecoder
from segcompass.interfaces.base import Alignment, Interface, InterfaceConfig, Material
from segcompass.interfaces.registry import register
from segcompass.reasoning.object_answers import TextObject, read_objects
from segcompass.reasoning.policy import PolicyConfig
from segcompass.reasoning.prompts import ParsedAnswer
from segcompass.types import BoxPrompts, ReasoningBatch, Status, given

_LEAST = 1e-4  # confidence of an object that SAM thinks nothing of; spare slots have none at all
_NO_MASK = -50.0


class TextReadoutConfig(InterfaceConfig, frozen=True):
    """What coordinates in an answer mean, and how masks are drawn from them."""

    canvas: Canvas = Field(Canvas(840), description="the square that coordinates refer to")
    points: bool = Field(
        True, description="show the points too; off where the segmenter never saw both together"
    )
    best_of_three: bool = Field(
        True, description="the best-rated of SAM's three masks; off where it learnt only its first"
    )


@register
class TextReadout(Interface):
    """Objects named in the answer's text become prompts of the segmenter, one slot each.

    Source: Seg-Zero, VisionReasoner: the best-rated of SAM's three masks for box and points
    together. The confidence is that rating, SAM's own estimate of the mask's IoU; the published
    pipelines accept every object, which is ``threshold: 0``. Nothing here is trained: what the
    policy learns, it learns from what its text says.
    """

    name = "text_readout"
    Config = TextReadoutConfig
    form = "objects"
    decoupled = True
    threshold = 0.0  # what is named is meant

    def __init__(self, config: TextReadoutConfig, decoder: PromptedDecoder) -> None:
        super().__init__()
        self.config, self.decoder = config, decoder

    @classmethod
    def build(cls, config: TextReadoutConfig, material: Material) -> TextReadout:
        """Make one around a segmenter; raises ValueError if policy and canvas disagree."""
        if material.policy is not None:
            _check_canvas(config.canvas, material.policy.config)
        return cls(config, material.prompted)

    def trained(self) -> dict[str, nn.Module]:
        """Nothing: the segmenter stays frozen."""
        return {}

    def align(
        self,
        states: ReasoningBatch,
        keys: Float[Tensor, "B C h w"],
        *,
        frames: Sequence[Frame],
        answers: Sequence[ParsedAnswer] | None = None,
        **_: Any,
    ) -> Alignment:
        """From the answers' text to prompts; a malformed answer names nothing.

        Raises:
            ValueError: if the answers are not given.
        """
        if answers is None:
            raise ValueError("text_readout reads the answers' text; pass answers")
        prompts = self.read(answers, frames)
        masks, confidences = self.draw(keys, prompts, frames)
        return Alignment(confidences, prompts=prompts, low_res=masks)

    def decode(
        self,
        keys: Float[Tensor, "B C h w"],
        alignment: Alignment,
        *,
        select: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> Float[Tensor, "*slots 4h 4w"]:
        """The segmenter's best mask for each object; nothing where a slot names none."""
        logits = given(alignment.low_res, "masks")
        return logits if select is None else logits[select]

    def read(self, answers: Sequence[ParsedAnswer], frames: Sequence[Frame]) -> list[BoxPrompts]:
        """Boxes and points in px of each image, padded with NaN to the most objects and points."""
        named = [read_objects(a.conclusion) if a.status == Status.OK else [] for a in answers]
        slots = max([1, *map(len, named)])
        points = max([1, *(len(found.points) for objects in named for found in objects)])
        return [
            self._prompts(objects, slots, points, frame.image_hw)
            for objects, frame in zip(named, frames, strict=True)
        ]

    def _prompts(
        self, objects: list[TextObject], slots: int, points: int, image_hw: tuple[int, int]
    ) -> BoxPrompts:
        boxes = np.full((slots, 4), np.nan, dtype=np.float32)
        spots = np.full((slots, points, 2), np.nan, dtype=np.float32)
        for row, found in enumerate(objects):
            boxes[row] = found.box
            spots[row, : len(found.points)] = np.reshape(found.points, (-1, 2))
        height, width = image_hw
        return BoxPrompts(
            self.config.canvas.boxes_to_image(boxes, image_hw).astype(np.float32),
            self.config.canvas.points_to_image(spots, image_hw)
            .clip(0, (width, height))
            .astype(np.float32),
        )

    def draw(
        self, keys: Float[Tensor, "B C h w"], prompts: Sequence[BoxPrompts], frames: Sequence[Frame]
    ) -> tuple[Float[Tensor, "B K 4h 4w"], Float[Tensor, "B K"]]:
        """Mask logits over the frame, and confidence logits: -inf where a slot names nothing."""
        by_image = list(zip(prompts, frames, strict=True))
        boxes = np.stack([boxes_to_frame(p.boxes, frame) for p, frame in by_image])
        points = np.stack([points_to_frame(p.points, frame) for p, frame in by_image])
        counts = np.isfinite(points[..., 0]).sum(-1) * self.config.points
        like, side = next(self.decoder.parameters()), self.decoder.mask_side
        logits = like.new_full((*counts.shape, side, side), _NO_MASK)
        scores = like.new_full(counts.shape, -torch.inf)
        for count in np.unique(counts):  # SAM reads a padded point as something
            chosen = np.nonzero(np.isfinite(boxes[..., 0]) & (counts == count))
            spots = torch.from_numpy(points[chosen][:, :count]).to(like)
            place = tuple(torch.from_numpy(part).to(like.device) for part in chosen)
            if len(spots) == 0:
                continue
            masks, ious = self.decoder.rated_prompts(
                keys,
                place[0],
                points=spots if count else None,
                boxes=torch.from_numpy(boxes[chosen]).to(like),
                best_of_three=self.config.best_of_three,
            )
            logits[place], scores[place] = masks, ious.clamp(_LEAST, 1 - _LEAST).logit()
        return logits, scores


def _check_canvas(canvas: Canvas, policy: PolicyConfig) -> None:
    """Answers have to be read on the canvas they are written on.

    Without padding the picture fills all that the policy sees, edge to edge, whether it is
    stretched to a square first or keeps its own proportions.

    Raises:
        ValueError: if size or fit differ.
    """
    side = policy.prompt.canvas_side
    if side != canvas.side:
        raise ValueError(
            f"answers are written on a canvas of {side} px (policy.prompt.canvas_side) and "
            f"read on one of {canvas.side} px (head.canvas.side); give both one size"
        )
    seen: Fit = "square" if policy.pad_to_square else "stretch"
    if canvas.fit != seen:
        raise ValueError(
            f"with policy.pad_to_square: {str(policy.pad_to_square).lower()} answers are written "
            f"on a canvas of fit {seen}, and head.canvas.fit reads them as {canvas.fit}; "
            f"set it to {seen}, or change pad_to_square"
        )
