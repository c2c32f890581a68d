"""Rea2Seg: another interface finds candidates, a policy looks at each and says how well it fits.

source's answer -> direct mask, slots, heatmap and attention peaks -> distinct candidates
                -> each marked in the picture -> thought and score
                -> the best one, if it is rated clearly above the source's answer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
from segcompass.io.errors import ConfigError
from segcompass.reasoning.policy import Policy, PolicyConfig
from segcompass.reasoning.prompts import score_template
from segcompass.reasoning.scorer import PolicyScorer
from segcompass.types import Candidates, Prediction, ReasoningBatch, Score, Status


class CandidateRerankConfig(OfInterface, InterfaceConfig, frozen=True):
    """The source (``interface`` and its ``head``), its candidates, and who judges them."""

    candidates: CandidateConfig = CandidateConfig()
    scorer: PolicyConfig | None = Field(
        None,
        description="how the judge is asked; null: for a score, in the source policy's chat, or "
        "in that of train_scorer.judge's family where another policy judges",
    )
    together: int = Field(16, ge=1, description="candidates that are judged at once")
    margin: float | None = Field(
        None,
        ge=0,
        le=1,
        description="a candidate replaces the source's answer if its score is higher by more than "
        "this; null: `train scorer` finds it, and without one it is 0",
    )

    @field_validator("scorer")
    @classmethod
    def _gives_scores(cls, value: PolicyConfig | None) -> PolicyConfig | None:
        if value is not None and value.prompt.form != "score":
            raise ValueError(f"the scorer's prompt.form must be score, got {value.prompt.form}")
        return value

    def asking(self, policy: PolicyConfig) -> PolicyConfig:
        """How the judge is asked, where the source's policy is asked like that.

        Raises:
            ConfigError: if nothing is configured, and the source's template is of no known chat.
        """
        if self.scorer is not None:
            return self.scorer
        try:
            asked = {"form": "score", "template": score_template(policy.prompt.template)}
        except ValueError as error:
            raise ConfigError(f"{error}; say in head.scorer how the judge is asked") from error
        return policy.model_copy(update={"prompt": policy.prompt.model_copy(update=asked)})


@register
class CandidateRerank(Interface):
    """Chooses among what another interface proposes.

    Source: Rea2Seg, which takes the best-rated candidate. Here the source's own answer stands
    unless another is rated above it by more than the margin: a judge that cannot tell candidates
    apart must not throw good answers away. With the direct mask as the only source of candidates
    there is nothing to choose.

    Args:
        config: Candidates and margin.
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
        use = config.asking(material.policy.config)
        if material.judge is not None:
            judge = material.judge(use)
            return cls(config, source, PolicyScorer(judge, together=config.together), judge)
        shared = Policy(material.policy.backbone, material.policy.tokenizer, use)
        return cls(config, source, PolicyScorer(shared, together=config.together))

    @property
    def head(self) -> nn.ModuleDict:
        """The source's."""
        return self.source.head

    def trained(self) -> dict[str, nn.Module]:
        """The source's."""
        return self.source.trained()

    @property
    def has_paths(self) -> bool:
        """As the source."""
        return self.source.has_paths

    def align(
        self, states: ReasoningBatch, keys: Float[Tensor, "B C h w"], **how: Any
    ) -> Alignment:
        """As the source does."""
        return self.source.align(states, keys, **how)

    def decode(
        self, keys: Float[Tensor, "B C h w"], alignment: Alignment, **how: Any
    ) -> Float[Tensor, "*slots 4h 4w"]:
        """As the source does."""
        return self.source.decode(keys, alignment, **how)

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
        margin = self.config.margin or 0.0
        return [
            choose(
                replace(prediction, timings=prediction.timings | spent), candidates, rated, margin
            )
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
    prediction: Prediction,
    candidates: Sequence[Candidate],
    scores: Sequence[Score],
    margin: float = 0.0,
) -> Prediction:
    """The source's answer, or the best candidate in its place if that leads by more than a margin.

    The winner takes the place of the slots that it stands for; other slots have no confidence left.
    That there is something at all is the source's word: the winner is as confident as the source's
    answer was. Where the source accepts nothing, the winner's score is its confidence.

    Args:
        prediction: of the source; well-formed.
        candidates: for its answer, the direct one first.
        scores: of the candidates.
        margin: in units of the score, 0 … 1; at 1 the source's answer always stands.
    """
    values = np.array([score.value for score in scores], dtype=np.float32)
    has_direct = bool(candidates) and "direct" in candidates[0].sources
    best, lead = favourite(values, has_direct, prediction.threshold)
    wins = best is not None and lead > margin
    weighed = Candidates(
        masks=np.stack([c.mask for c in candidates])
        if candidates
        else np.zeros((0, *prediction.image_rgb.shape[:2]), dtype=bool),
        scores=values,
        sources=tuple(", ".join(candidate.sources) for candidate in candidates),
        thoughts=tuple(score.thought for score in scores),
        chosen=best if wins else 0 if has_direct else None,
    )
    answer = replace(prediction, candidates=weighed)
    if best is None or not wins:
        return answer
    sure = prediction.scores.max() if prediction.accepted.any() else values[best]
    return _in_place(answer, candidates[best], float(sure))


def favourite(
    scores: Float[np.ndarray, "M"], has_direct: bool, threshold: float
) -> tuple[int | None, float]:
    """The best-rated candidate, and how far its score is above that of the source's answer.

    An answer without a mask cannot be shown to the judge: "nothing matches" counts as rated at the
    threshold, above which a mask counts. (A score is an expected IoU: where the best candidate's is
    r, "nothing" is right with probability 1 - r at most. So 0.5 is where the two meet.)

    Args:
        scores: of the candidates.
        has_direct: the first one is the source's answer; else that is empty.
        threshold: confidence above which a mask counts.

    Returns:
        Index, None where there is no candidate; lead, above 0 where the source's answer is not the
        best.
    """
    if not len(scores):
        return None, 0.0
    best = int(scores.argmax())
    return best, float(scores[best] - (scores[0] if has_direct else threshold))


def _in_place(prediction: Prediction, winner: Candidate, confidence: float) -> Prediction:
    """The prediction with the winner in the place of its slots, and nothing else accepted."""
    slots = list(winner.slots)
    masks, low_res = prediction.slot_masks.copy(), prediction.low_res_logits.copy()
    if winner.low_res is not None:
        masks[slots], low_res[slots] = winner.mask, winner.low_res
    confidences = np.zeros_like(prediction.slot_scores)
    confidences[slots] = confidence
    return replace(
        prediction,
        status=Status.OK,
        slot_masks=masks,
        slot_scores=confidences,
        accepted=confidences > prediction.threshold,
        low_res_logits=low_res,
    )
