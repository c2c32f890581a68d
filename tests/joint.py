"""A joint step over tiny parts, whose answers have the form and the lengths that a test wants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from forced import answers_of
from tiny import WIDTH, policy_config, tiny_head, tiny_sam
from torch import Tensor, nn

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.interfaces.concept_slots import ConceptSlots
from segcompass.learning.config import RunConfig
from segcompass.learning.engine.loop import Losses
from segcompass.learning.rollouts import Rollouts, sample_answers
from segcompass.learning.stages import JointStage
from segcompass.learning.train_joint import JointStep, Questions
from segcompass.model_folder import ModelConfig, build_interface
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Policy
from segcompass.types import ReasoningBatch

LENGTHS = (6, 11, 4, 8)  # of thoughts, so that answers end at different places
HALF_WHOLE = (6, None, 4, None)  # None: cut off, malformed
MASKS = ("heatmap_bce", "heatmap_dice", "dice", "focal")


class Parts(NamedTuple):
    """The parts of a model before their joint stage."""

    policy: Policy
    encoder: ImageEncoder
    interface: ConceptSlots
    config: RunConfig


def build_parts(
    family: str, policy_folder: Path, data: Path, run: Path, latents: int = 64
) -> Parts:
    """Fresh parts, the same every time."""
    policy = load_policy(policy_folder, policy_config(family))
    torch.manual_seed(0)
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=WIDTH, d_sae=latents))
    sam = tiny_sam()
    torch.manual_seed(0)
    interface = build_interface(
        ModelConfig(policy=policy.config, head=tiny_head()), policy, sam, sae
    )
    once = {"steps": 1, "learning_rate": 0.01}
    stages = {"train_sae": once, "train_joint": once}
    config = RunConfig.model_validate({"run": run, "data": {"root": data}, **stages})
    return Parts(policy, ImageEncoder(sam), interface, config)


def stage(**changes: Any) -> JointStage:
    """Two questions with two answers each."""
    rollout = {"group": 2, "max_new_tokens": 30, **changes.pop("rollout", {})}
    settings = {"steps": 3, "batch": 2, "learning_rate": 0.01, "group": 1, "rollout": rollout}
    return JointStage.model_validate({**settings, **changes})


def take(step: JointStep, number: int = 0, lengths: tuple[int | None, ...] = LENGTHS) -> Losses:
    """Losses of a step whose answers think for these lengths."""
    (values,) = micro_batches(step, number, lengths)
    return values


def micro_batches(
    step: JointStep, number: int = 0, lengths: tuple[int | None, ...] = LENGTHS
) -> Iterator[Losses]:
    """The same, one micro-batch after the other."""
    torch.manual_seed(5)
    with answers_of(*lengths):
        yield from step(number)


def step_and_backward(
    step: JointStep, number: int = 0, lengths: tuple[int | None, ...] = LENGTHS
) -> Losses:
    values = take(step, number, lengths)
    values["loss"].backward()  # type: ignore[no-untyped-call]
    return values


def answered(
    step: JointStep, lengths: tuple[int | None, ...] = LENGTHS
) -> tuple[Rollouts, Questions, ReasoningBatch, Tensor]:
    """Rollouts to the first questions, and what the pass with gradient makes of them."""
    questions = step.questions(step.samples[:2]).take([0, 0, 1, 1])
    torch.manual_seed(5)
    with answers_of(*lengths):
        rollouts = sample_answers(
            step.policy,
            questions.visuals,
            [s.instruction for s in questions.samples],
            step.stage.rollout,
            questions.features,
        )
    states, hidden = step.policy(rollouts.sequences, questions.visuals, questions.features)
    return rollouts, questions, states, hidden


def reached(part: nn.Module) -> dict[str, bool]:
    """Whether each parameter has a gradient that is not all zero."""
    return {
        name: p.grad is not None and bool(p.grad.abs().sum() > 0)
        for name, p in part.named_parameters()
    }


@torch.no_grad()
def sharpen(step: JointStep) -> None:
    """Let masks and confidences depend visibly on what was thought, as after training."""
    step.interface.mapper.to_q.weight.mul_(30)
    step.interface.mapper.map_head[-1].weight.mul_(10)
