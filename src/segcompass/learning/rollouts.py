"""Sampled answers, with all that was seen while they were written (promise 2 of the design).

States for the head and log-probabilities come from the sampling pass itself; nothing is computed
a second time for the sake of a reward. Answers that another program sampled are read in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, Field
from torch import Tensor, nn

from segcompass.learning.engine.sharding import gathered
from segcompass.learning.grpo import answer_log_probs
from segcompass.reasoning.backbones import VisualInput
from segcompass.reasoning.policy import Generation, Policy
from segcompass.reasoning.sequences import Sequences
from segcompass.types import ReasoningBatch, Status


class RolloutConfig(BaseModel, frozen=True, extra="forbid"):
    """How answers are sampled."""

    backend: Literal["transformers", "vllm"] = Field(
        "transformers", description="vllm is an extra, and needs a GPU"
    )
    vllm_memory: float = Field(0.3, gt=0, lt=1, description="share of a GPU that vLLM may take")
    group: int = Field(8, ge=1, description="answers to each question, G")
    batch: int | None = Field(
        None, ge=1, description="answers of a rank that are sampled together; null: all"
    )
    temperature: float = Field(1.0, gt=0)
    max_new_tokens: int | None = Field(None, ge=1, description="the policy's own limit by default")
    forced_steps: int = Field(
        0, ge=0, description="first steps with rollouts in which the answer's form is forced"
    )


class Rollouts(NamedTuple):
    """B = n·G answers, those to one question side by side."""

    sequences: Sequences  # prompts and answers
    is_answer: Bool[Tensor, "B L"]
    log_probs: Float[Tensor, "B L"]  # of the answers' tokens, under the policy that wrote them
    states: ReasoningBatch
    well_formed: Bool[Tensor, "B"]
    ids: list[list[int]]  # the answers, with their end-of-text if they came to it
    texts: list[str]


class Sampler(Protocol):
    """Writes answers, one to each row of its input."""

    def __call__(
        self,
        policy: Policy,
        visuals: Sequence[VisualInput],
        instructions: Sequence[str],
        config: RolloutConfig,
        features: Sequence[Float[Tensor, "n D"]] | None = None,
        *,
        force_form: bool = False,
    ) -> Rollouts:
        """See :func:`sample_answers`."""


@torch.no_grad()
def sample_answers(
    policy: Policy,
    visuals: Sequence[VisualInput],
    instructions: Sequence[str],
    config: RolloutConfig,
    features: Sequence[Float[Tensor, "n D"]] | None = None,
    *,
    force_form: bool = False,
) -> Rollouts:
    """Sample answers with the policy's own generation; one row of input is one answer.

    Args:
        policy: The policy as it is now.
        visuals: One per row; repeat a question's G times.
        instructions: One per row.
        config: Temperature and limit.
        features: Precomputed image features, if at hand.
        force_form: Open every thought, close it in time and write the K tokens after it.
    """
    with evaluating(policy), gathered(policy):
        written = policy.generate(
            visuals,
            instructions,
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            features=features,
            force_form=force_form,
        )
    return _rollouts(policy, written, config)


@torch.no_grad()
def score_answers(
    policy: Policy,
    visuals: Sequence[VisualInput],
    instructions: Sequence[str],
    answers: Sequence[list[int]],
    config: RolloutConfig,
    features: Sequence[Float[Tensor, "n D"]] | None = None,
) -> Rollouts:
    """The same for answers that are there already, from one pass of the policy over them.

    Args:
        policy: The policy that wrote them, as it is now.
        visuals: One per row.
        instructions: One per row.
        answers: Token ids, end-of-text included where an answer came to it.
        config: The temperature that they were sampled with.
        features: Precomputed image features, if at hand.
    """
    with evaluating(policy):
        read = policy.read(visuals, instructions, answers, features)
    return _rollouts(policy, read, config)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _rollouts(policy: Policy, written: Generation, config: RolloutConfig) -> Rollouts:
    ids, is_answer = written.sequences.ids, written.is_answer
    return Rollouts(
        sequences=written.sequences,
        is_answer=is_answer,
        log_probs=answer_log_probs(policy, written.hidden, ids, is_answer, config.temperature),
        states=written.states,
        well_formed=torch.tensor([a.status == Status.OK for a in written.answers]).to(ids.device),
        ids=[row[mask].tolist() for row, mask in zip(ids, is_answer, strict=True)],
        texts=written.texts,
    )
