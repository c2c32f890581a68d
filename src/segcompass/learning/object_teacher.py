"""What an interface that reads the answer's text is taught with: the objects' boxes and points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from segcompass.geometry import Canvas
from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.interfaces.base import Interface, InterfaceConfig
from segcompass.interfaces.text_readout import TextReadoutConfig
from segcompass.io.masks import boxes, decode
from segcompass.learning.object_rewards import ObjectScores, object_scores
from segcompass.learning.questions import Questions
from segcompass.learning.rollouts import Rollouts
from segcompass.learning.segmentation import PlaceHead, Terms
from segcompass.learning.stages import JointStage
from segcompass.learning.teachers import Rewards
from segcompass.reasoning.object_answers import TextObject, write_objects
from segcompass.reasoning.policy import Policy
from segcompass.reasoning.prompts import PromptConfig
from segcompass.types import ReasoningBatch, Sample


class ObjectTeacher:
    """Seg-Zero's way: the oracle's boxes and points as text, rewards for them, no masks.

    Args: as of `teachers.MaskTeacher`; the encoder and the place head are not needed.
    """

    def __init__(
        self,
        policy: Policy,
        encoder: ImageEncoder,
        interface: Interface,
        stage: JointStage,
        place: PlaceHead | None,
    ) -> None:
        self.canvas: Canvas = interface.config.canvas
        self.config = stage.object_rewards
        self.conclude = oracle_conclusion(policy.config.prompt, interface.config)

    def counts(self, samples: Sequence[Sample]) -> dict[str, int]:
        """Nothing is supervised."""
        return {}

    def supervise(self, states: ReasoningBatch, questions: Questions) -> Terms:
        """Nothing: masks give no gradient to the policy."""
        return {}

    def rewards(self, rollouts: Rollouts, questions: Questions) -> Rewards:
        """What each text earns, and its scores."""
        scores, totals = [], []
        for text, sample in zip(rollouts.texts, questions.samples, strict=True):
            wanted = target_objects(sample, self.canvas)
            scores.append(object_scores(text, wanted, self.canvas.side, self.config))
            totals.append(scores[-1].reward(self.config))
        device = rollouts.well_formed.device
        columns = zip(ObjectScores._fields, zip(*scores, strict=True), strict=True)
        parts = {f"reward_{name}": torch.tensor(values, device=device) for name, values in columns}
        return {"reward": torch.tensor(totals, device=device), **parts}


def oracle_conclusion(
    prompt: PromptConfig, interface: InterfaceConfig
) -> Callable[[Sample], str] | None:
    """How the oracle's answer to a sample ends, for policies whose answers name objects."""
    if prompt.form != "objects" or not isinstance(interface, TextReadoutConfig):
        return None
    return partial(_conclusion, canvas=interface.canvas, most=prompt.slots)


def _conclusion(sample: Sample, *, canvas: Canvas, most: int) -> str:
    """The sample's first targets as text."""
    return write_objects(target_objects(sample, canvas)[:most], canvas.side)


def target_objects(sample: Sample, canvas: Canvas) -> list[TextObject]:
    """Box and a point deep inside of every target, in px of the canvas; empty masks are left out.

    The point is the centre of a pixel that is farthest from the mask's edge.
    """
    masks = [mask for mask in map(decode, sample.targets) if mask.any()]
    if not masks:
        return []
    edges = canvas.boxes_to_canvas(boxes(np.stack(masks)), sample.image_hw)
    points = canvas.points_to_canvas(np.array([_deepest(m) for m in masks]), sample.image_hw)
    return [
        TextObject((x0, y0, x1, y1), ((x, y),))
        for (x0, y0, x1, y1), (x, y) in zip(edges.tolist(), points.tolist(), strict=True)
    ]


def _deepest(mask: np.ndarray) -> tuple[float, float]:
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]  # the picture's rim is an edge
    y, x = np.unravel_index(int(depth.argmax()), mask.shape)
    return float(x) + 0.5, float(y) + 0.5
