"""Rea2Seg: another interface finds candidates, a policy looks at each and says how well it fits.

source's answer -> direct mask, slots, heatmap and attention peaks -> distinct candidates
                -> each marked in the picture -> thought and score -> the best one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor, nn

from segcompass.geometry import Frame
from segcompass.grounding.marking import mark
from segcompass.interfaces.base import Alignment, Interface, InterfaceConfig, Material, Scorer
from segcompass.interfaces.candidates import Candidate, CandidateConfig, PointPrompt, propose
from segcompass.interfaces.registry import OfInterface, find, register
from segcompass.io.clock import Clock
from segcompass.reasoning.policy import Policy, PolicyConfig
from segcompass.reasoning.prompts import ParsedAnswer, PromptConfig
from segcompass.reasoning.scorer import PolicyScorer
from segcompass.types import Candidates, Prediction, ReasoningBatch, Score, Status


class CandidateRerankConfig(OfInterface, InterfaceConfig, frozen=True):
    """The source (``interface`` and its ``head``), its candidates, and who judges them."""

    candidates: CandidateConfig = CandidateConfig()
    scorer: PolicyConfig = Field(
        PolicyConfig(prompt=PromptConfig(form="score")), description="how the judge is asked"
    )

    @field_validator("scorer")
    @classmethod
    def _gives_scores(cls, value: PolicyConfig) -> PolicyConfig:
        if value.prompt.form != "score":
            raise ValueError(f"the scorer's prompt.form must be score, got {value.prompt.form}")
        return value


@register
class CandidateRerank(Interface):
    """Chooses among what another interface proposes.

    Source: Rea2Seg. With the direct mask as the only source of candidates there is nothing to
    choose, and the answer is the source's own.

    Args:
        config: Candidates.
        source: The interface that answers first.
        scorer: Judges candidates.
        judge: The scorer's policy where it is not the source's, to be saved with the model.
    """

    name = "candidate_rerank"
    Config = CandidateRerankConfig

    def __init__(
        self,
        config: CandidateRerankConfig,
        source: Interface,
        scorer: Scorer,
        judge: Policy | None = None,
    ) -> None:
        super().__init__()
        self.config, self.source, self.scorer, self.judge = config, source, scorer, judge
        self.decoder, self.sae = source.decoder, source.sae
        self.form, self.query_width = source.form, source.query_width
        self.reads_attention = "attention" in config.candidates.sources

    @classmethod
    def build(cls, config: CandidateRerankConfig, material: Material) -> CandidateRerank:
        """Make the source of its own settings; without a second policy the first one judges."""
        source = find(config.interface).build(config.head, material)
        if material.policy is None:
            raise ValueError("candidate_rerank asks a policy; give the material one")
        show_attention(material.policy, config.candidates)
        if material.judge is not None:
            judge = material.judge(config.scorer)
            return cls(config, source, PolicyScorer(judge), judge)
        shared = Policy(material.policy.backbone, material.policy.tokenizer, config.scorer)
        return cls(config, source, PolicyScorer(shared))

    @property
    def head(self) -> nn.ModuleDict:
        """The source's."""
        return self.source.head

    def trained(self) -> dict[str, nn.Module]:
        """The source's."""
        return self.source.trained()

    def align(
        self,
        states: ReasoningBatch,
        keys: Float[Tensor, "B C h w"],
        *,
        frames: Sequence[Frame],
        answers: Sequence[ParsedAnswer] | None = None,
        need_attention: bool = False,
        gates: Float[Tensor, "#B 2"] | None = None,
    ) -> Alignment:
        """As the source does."""
        return self.source.align(
            states,
            keys,
            frames=frames,
            answers=answers,
            need_attention=need_attention,
            gates=gates,
        )

    def decode(
        self,
        keys: Float[Tensor, "B C h w"],
        alignment: Alignment,
        *,
        frames: Sequence[Frame],
        select: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "*slots 4h 4w"]:
        """As the source does."""
        return self.source.decode(keys, alignment, frames=frames, select=select)

    def conclude(
        self,
        predictions: list[Prediction],
        keys: Float[Tensor, "B C h w"],
        frames: Sequence[Frame],
    ) -> list[Prediction]:
        """Find, judge and choose; an answer that is not well-formed proposes nothing."""
        predictions = self.source.conclude(predictions, keys, frames)
        if self.config.candidates.sources == ("direct",):
            return predictions
        clock = Clock()
        found = self.propose(predictions, keys, frames)
        clock.lap("candidates")
        scores = self.judged(predictions, found)
        clock.lap("scoring")
        spent = {stage: seconds / len(predictions) for stage, seconds in clock.laps.items()}
        return [
            choose(replace(prediction, timings=prediction.timings | spent), candidates, rated)
            if prediction.status.well_formed
            else prediction
            for prediction, candidates, rated in zip(predictions, found, scores, strict=True)
        ]

    def propose(
        self,
        predictions: Sequence[Prediction],
        keys: Float[Tensor, "B C h w"],
        frames: Sequence[Frame],
    ) -> list[list[Candidate]]:
        """The candidates of every picture."""
        return [
            propose(prediction, self._pointing(keys, row), frame, self.config.candidates)
            if prediction.status.well_formed
            else []
            for row, (prediction, frame) in enumerate(zip(predictions, frames, strict=True))
        ]

    def _pointing(self, keys: Tensor, row: int) -> PointPrompt:
        """The segmenter, prompted with points in one of the pictures."""
        weight = next(self.decoder.parameters())

        def prompt(points: Float[np.ndarray, "M 2"]) -> Tensor:
            return self.decoder.decode_prompts(
                keys,
                torch.full((len(points),), row, device=weight.device),
                points=torch.from_numpy(points)[:, None].to(weight),
                best_of_three=self.config.candidates.best_of_three,
            )

        return prompt

    def judged(
        self, predictions: Sequence[Prediction], found: Sequence[Sequence[Candidate]]
    ) -> list[list[Score]]:
        """What the scorer says of every candidate; all pictures go to it together."""
        pairs = [(p, c) for p, own in zip(predictions, found, strict=True) for c in own]
        pictures = [mark(prediction.image_rgb, candidate.mask) for prediction, candidate in pairs]
        scores = iter(self.scorer.score(pictures, [p.instruction for p, _ in pairs]))
        return [[next(scores) for _ in own] for own in found]


def show_attention(policy: Policy, config: CandidateConfig) -> None:
    """Make the policy's attention eager where candidates come from it: others show nothing."""
    if "attention" in config.sources:
        policy.model.set_attn_implementation({"text_config": "eager"})


def choose(
    prediction: Prediction, candidates: Sequence[Candidate], scores: Sequence[Score]
) -> Prediction:
    """The prediction with the best candidate as its answer.

    The winner takes the place of the slots that it stands for, and its score becomes their
    confidence; other slots have none. So ``threshold`` decides whether there is a target, and may
    be chosen as for any other model.
    """
    values = np.array([score.value for score in scores], dtype=np.float32)
    best = int(values.argmax()) if len(values) else None
    weighed = Candidates(
        masks=np.stack([c.mask for c in candidates])
        if candidates
        else np.zeros((0, *prediction.image_rgb.shape[:2]), dtype=bool),
        scores=values,
        sources=tuple(", ".join(candidate.sources) for candidate in candidates),
        thoughts=tuple(score.thought for score in scores),
        chosen=best,
    )
    masks, low_res = prediction.slot_masks.copy(), prediction.low_res_logits.copy()
    confidences = np.zeros_like(prediction.slot_scores)
    if best is not None:
        winner = candidates[best]
        confidences[list(winner.slots)] = values[best]
        if winner.low_res is not None:
            masks[list(winner.slots)], low_res[list(winner.slots)] = winner.mask, winner.low_res
    accepted = confidences > prediction.threshold
    return replace(
        prediction,
        status=Status.OK if accepted.any() else Status.NO_TARGET,
        slot_masks=masks,
        slot_scores=confidences,
        accepted=accepted,
        low_res_logits=low_res,
        candidates=weighed,
    )
