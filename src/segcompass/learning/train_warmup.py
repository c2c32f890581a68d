"""Warm-up: the policy alone learns to see and to speak, before it is asked to segment.

Two stages. `vision`: every image token tells what stands in its map cell, which colour, size and
texture it has, and where the cell is. `language`: questions and the oracle's whole answers. The
oracle lists the scene before it reasons, so every answer is a caption too; without captions the
words that depend on the picture are too few to learn from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from segcompass.data.scenes.catalog import MAP_SIDE
from segcompass.io.errors import ConfigError
from segcompass.learning.checks import training_samples
from segcompass.learning.config import RunConfig
from segcompass.learning.corpus import (
    DENSE_TARGETS,
    dense_targets,
    encode_answers,
    has_thought,
    read_pictures,
    repeated,
    seen_memo,
    stack_targets,
    visual_memo,
)
from segcompass.learning.engine.distributed import World
from segcompass.learning.engine.loop import Loop, Losses, batch_indices, grouped_indices
from segcompass.learning.grpo import in_chunks
from segcompass.learning.object_teacher import oracle_conclusion
from segcompass.learning.stages import LanguageStage, VisionStage
from segcompass.learning.watching.watch import stage_observers
from segcompass.reasoning.backbones import VisualInput
from segcompass.reasoning.policy import Policy
from segcompass.reasoning.sequences import Sequences
from segcompass.types import Sample, TokenKind

_EMPTY = {"here_category", "cover_category"}  # targets with a class for "nothing"


class DenseHeads(nn.Module):
    """One linear read-out per dense target; thrown away after the stage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({n: nn.Linear(width, c) for n, c in DENSE_TARGETS.items()})

    def losses(
        self, features: Tensor, targets: dict[str, Tensor], background: float, world: World
    ) -> Losses:
        """Cross-entropy of every target, and the accuracy on cells that hold a thing."""
        sums, weights, right = [], [], {}
        for name, head in self.heads.items():
            logits = head(features)
            target = targets[name].to(logits.device)
            weight = torch.ones(logits.shape[-1], device=logits.device)
            if name in _EMPTY:
                weight[-1] = background
            sums.append(F.cross_entropy(logits, target, weight, reduction="sum"))
            weights.append(weight[target[target >= 0]].sum())
            if name.startswith("here"):
                at = (target >= 0) & (target < logits.shape[-1] - (name in _EMPTY))
                right[f"acc_{name}"] = (logits.argmax(-1) == target)[at].float()
        # Of all ranks' cells together; a target that no cell of the batch has costs nothing.
        totals = world.sum(torch.stack(weights)).clamp(min=1e-6)
        loss = (torch.stack(sums) / totals).sum() * world.size
        return {"loss": loss, **world.means(right)}


def train_vision(policy: Policy, config: RunConfig, stage: VisionStage, folder: Path) -> None:
    """Pretrain the vision tower on dense targets."""
    records = read_pictures(config.data)
    torch.manual_seed(config.seed)
    heads = DenseHeads(policy.width).to(policy.model.device)
    tower = policy.backbone.vision
    parts = {"tower": tower, "heads": heads}
    observers = stage_observers(config, folder)
    loop = Loop(folder, "vision", parts, stage, config.seed, observers=observers)
    loop.resume()
    visuals = visual_memo(policy.backbone)
    targets = cache(lambda i: dense_targets(records[i]))
    grid = visuals(records[0].image_path).grid
    if grid != (MAP_SIDE, MAP_SIDE):
        raise ConfigError(
            f"train_vision teaches a {MAP_SIDE}x{MAP_SIDE} map of image tokens, this policy makes "
            f"{grid[0]}x{grid[1]}; change image_side or patch, or leave the stage out"
        )

    def losses(step: int) -> Losses:
        drawn = batch_indices(step, stage.batch, len(records), config.seed)
        chosen = loop.world.slice(drawn)
        batch = [visuals(records[i].image_path) for i in chosen]
        features = torch.cat(policy.backbone.embed_images(batch)).float()
        wanted = stack_targets(targets(i) for i in chosen)
        return heads.losses(features, wanted, stage.background_weight, loop.world)

    loop.run(losses)


def train_language(policy: Policy, config: RunConfig, stage: LanguageStage, folder: Path) -> None:
    """Train the language model on questions and oracle answers."""
    known = training_samples(config.data, policy.prompt, config.run)
    samples = repeated(filter(has_thought, known), stage.no_target_repeats)
    visuals, features = _pictures(policy, samples, stage)
    policy.backbone.vision.requires_grad_(stage.train_vision)
    observers = stage_observers(config, folder)
    loop = Loop(
        folder, "language", {"policy": policy.model}, stage, config.seed, observers=observers
    )
    loop.resume()
    lengths = [len(s.thought or "") + len(s.instruction) for s in samples]
    conclude = oracle_conclusion(policy.config.prompt, config.head)

    def losses(step: int) -> Losses:
        drawn = grouped_indices(step, stage.batch, lengths, stage.group, config.seed)
        batch = [samples[i] for i in loop.world.slice(drawn)]
        pictures, sequences = encode_answers(policy, batch, visuals, conclude)
        seen = [features(s.image_path) for s in batch] if features else None
        _, hidden = policy(sequences, pictures, seen)
        tokens, right = answer_losses(policy, sequences, hidden)
        return loop.world.means({"loss": tokens, "accuracy": right.float()})

    loop.run(losses)
    policy.backbone.vision.requires_grad_(True)


def _pictures(
    policy: Policy, samples: list[Sample], stage: LanguageStage
) -> tuple[Callable[[Path], VisualInput], Callable[[Path], Tensor] | None]:
    """How to get a picture, and what a frozen tower makes of it."""
    if stage.train_vision:
        return visual_memo(policy.backbone), None
    seen = seen_memo(policy.backbone, [s.image_path for s in samples])
    seen.share(World.current())
    return lambda path: seen(path)[0], lambda path: seen(path)[1]


def answer_losses(
    policy: Policy, sequences: Sequences, hidden: Float[Tensor, "B L D"]
) -> tuple[Float[Tensor, "n"], Bool[Tensor, "n"]]:
    """Cross-entropy of each of the answers' n tokens, and whether it was predicted exactly."""
    is_answer = answer_tokens(sequences)
    targets = sequences.ids[:, 1:][is_answer[:, 1:]]

    def some(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        logits = policy.language_logits(states).float()
        return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted

    losses, right = in_chunks(some, hidden[:, :-1][is_answer[:, 1:]], targets)
    return losses, right


def answer_tokens(sequences: Sequences) -> Bool[Tensor, "B L"]:
    """The tokens of whole answers that stand at the right, end-of-text included."""
    is_answer = sequences.kinds >= TokenKind.THOUGHT
    is_answer[:, -1] = True  # end-of-text
    return is_answer
