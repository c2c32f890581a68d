"""What an interface is taught with: supervision of its masks, and the reward of an answer.

The training loop is one for all interfaces; a teacher holds what differs between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.interfaces.base import Alignment, Interface
from segcompass.interfaces.heatmaps import HeatmapInterface
from segcompass.learning.questions import Questions
from segcompass.learning.rewards import format_score, mask_score
from segcompass.learning.rollouts import Rollouts
from segcompass.learning.segmentation import (
    HEATMAP_TERMS,
    MASK_TERMS,
    PlaceHead,
    Terms,
    segmentation_terms,
    wanted_maps,
)
from segcompass.learning.stages import JointStage
from segcompass.reasoning.policy import Policy
from segcompass.types import ReasoningBatch, Sample

Rewards = dict[str, Float[Tensor, "B"]]  # "reward", and the scores that it is made of


class Teacher(Protocol):
    """Knows what is right for one kind of interface."""

    conclude: Callable[[Sample], str] | None  # how the oracle's answer to a sample ends, as text

    def supervise(self, states: ReasoningBatch, questions: Questions) -> Terms:
        """The supervised terms of well-formed answers, with gradient."""

    def counts(self, samples: Sequence[Sample]) -> dict[str, int]:
        """How many values each supervised term has for well-formed answers to these samples."""

    def rewards(self, rollouts: Rollouts, questions: Questions) -> Rewards:
        """What each answer earns, from what it was written with."""


class MaskTeacher:
    """Eq. 6 and B.3: masks are supervised, and rewarded.

    Args:
        policy: Knows the form of an answer.
        encoder: Of the segmenter.
        interface: That is trained.
        stage: Weights and rewards.
        place: Reads places off queries; None leaves that term out.
    """

    conclude: Callable[[Sample], str] | None = None

    def __init__(
        self,
        policy: Policy,
        encoder: ImageEncoder,
        interface: Interface,
        stage: JointStage,
        place: PlaceHead | None,
    ) -> None:
        self.prompt, self.slots, self.side = policy.prompt, policy.slots, encoder.side
        self.interface, self.stage, self.place = interface, stage, place

    def supervise(self, states: ReasoningBatch, questions: Questions) -> Terms:
        """Losses on the slots that match the targets."""
        gates = self.gates(len(states.token_ids), questions.keys.device)
        return segmentation_terms(
            self.interface,
            questions.keys,
            self.align(states, questions, gates),
            questions.samples,
            questions.frames,
            order=self.stage.order_weight,
            place=self.place,
        )

    def counts(self, samples: Sequence[Sample]) -> dict[str, int]:
        """All slots have confidences; each target is matched, as long as there are slots."""
        pairs = sum(min(self.slots, len(s.targets)) for s in samples)
        names: tuple[str, ...] = MASK_TERMS
        names += HEATMAP_TERMS if isinstance(self.interface, HeatmapInterface) else ()
        names += () if self.place is None else ("place",)
        return {"confidence": len(samples) * self.slots, **dict.fromkeys(names, pairs)}

    @torch.no_grad()
    def rewards(self, rollouts: Rollouts, questions: Questions) -> Rewards:
        """Form and masks, from the states that the answers were written with."""
        form = [format_score(self.prompt, ids) for ids in rollouts.ids]
        masks = [0.0] * len(form)
        good = rows_of(rollouts.well_formed)
        if good:
            chosen = questions.take(good)
            states = ReasoningBatch(*(part[good] for part in rollouts.states))
            # What never trains is not rewarded either; else answers earn what they would be worth.
            one_path = 1.0 in (self.stage.drop_tokens, self.stage.drop_concepts)
            gates = self.gates(len(good), chosen.keys.device) if one_path else None
            alignment = self.align(states, chosen, gates)
            counts = alignment.confidence_logits.sigmoid() > self.stage.rewards.threshold
            rows, columns = counts.nonzero().unbind(1)
            select = (rows, columns)
            frames, grid = chosen.frames, 4 * chosen.keys.shape[-1]
            logits = self.interface.decode(chosen.keys, alignment, frames=frames, select=select)
            found = torch.split(logits, counts.sum(1).tolist())
            for row, sample, maps in zip(good, chosen.samples, found, strict=True):
                wanted = wanted_maps(sample, self.side, grid, together=self.slots == 1)
                masks[row] = mask_score(maps, wanted.to(maps.device), self.stage.rewards)
        device = questions.keys.device
        parts = torch.tensor(form, device=device), torch.tensor(masks, device=device)
        total = self.stage.rewards.format * parts[0] + self.stage.rewards.mask * parts[1]
        return {"reward": total, "reward_format": parts[0], "reward_mask": parts[1]}

    def align(
        self, states: ReasoningBatch, questions: Questions, gates: Tensor | None = None
    ) -> Alignment:
        """From states to slots."""
        return self.interface.align(states, questions.keys, frames=questions.frames, gates=gates)

    def gates(self, count: int, device: torch.device) -> Float[Tensor, "B 2"]:
        """Cut off one path of some rows, never both, so that neither path becomes decorative."""
        draw = torch.rand(count, device=device)
        tokens = draw >= self.stage.drop_tokens
        concepts = draw < 1 - self.stage.drop_concepts
        return torch.stack([tokens, concepts], 1).float()


def rows_of(mask: Bool[Tensor, "B"]) -> list[int]:
    """The rows that a mask names."""
    return [int(i) for i in mask.nonzero().flatten()]
