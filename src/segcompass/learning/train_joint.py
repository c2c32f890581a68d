"""Joint training: reinforcement shapes the reasoning, supervision the masks, in one backward pass.

    question -> G sampled answers -> their masks -> rewards -> advantages          Eq. 10, B.3
             -> one policy pass with gradient -> log-probabilities                 Eq. 10
                                              -> concepts, slots, matched masks    Eq. 6
             -> one pass of the frozen reference -> KL penalty                     Eq. 11

Frozen: the segmenter's image encoder (its keys are computed once), the SAE, and the policy up to
the SAE layer, so that what the SAE reads does not drift. In the first ``oracle_steps`` the answers
are the data set's own: the head learns to read before its masks are anyone's reward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from segcompass.geometry import padding_mask
from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.interfaces.base import Alignment
from segcompass.interfaces.concept_slots import ConceptSlots
from segcompass.learning.checks import training_samples
from segcompass.learning.config import JointStage, RunConfig
from segcompass.learning.corpus import encode_answers, target_grid
from segcompass.learning.engine.distributed import World
from segcompass.learning.engine.freezing import freeze, frozen_copy
from segcompass.learning.engine.loop import Loop, Losses, grouped_indices
from segcompass.learning.engine.lora import reference as without_adapters
from segcompass.learning.engine.sharding import anchor, enable_checkpointing, shard
from segcompass.learning.grpo import advantages, answer_log_probs, grpo_loss
from segcompass.learning.questions import PictureMemo, Questions
from segcompass.learning.rewards import format_score, mask_score
from segcompass.learning.rollouts import Rollouts, sample_answers
from segcompass.learning.segmentation import PlaceHead, Terms, segmentation_terms
from segcompass.learning.train_warmup import answer_losses
from segcompass.learning.watching.watch import joint_observers, joint_panels
from segcompass.pipeline import SegCompass
from segcompass.reasoning.policy import Policy
from segcompass.types import ReasoningBatch


def train_joint(
    policy: Policy,
    encoder: ImageEncoder,
    interface: ConceptSlots,
    config: RunConfig,
    stage: JointStage,
    folder: Path,
    before: Callable[[int], None] = lambda _step: None,
) -> None:
    """Train everything after the SAE layer; see `JointStage` for what is rewarded and what costs.

    ``before`` is called on every rank with the number of each step that is about to be taken.

    Raises:
        DataError: if the data is missing or broken.
        DivergenceError: if a loss is no longer finite.
    """
    parts = freeze(policy, encoder, interface, stage, config.seed)
    step = JointStep(policy, encoder, interface, config, stage)
    parts["place"] = step.place
    if stage.gradient_checkpointing:
        enable_checkpointing(policy)
    for part in filter(None, (policy, step.reference)):
        shard(part, step.world)
    loop = Loop(
        folder,
        "joint",
        parts,
        stage,
        config.seed,
        stage.multipliers.model_dump(),
        observers=joint_observers(config, stage, folder),
    )
    model = SegCompass(policy, encoder, interface)
    panels = joint_panels(config, stage, folder, model, step.world)
    loop.resume()
    losses = panels.before(step) if panels else step

    def one_step(number: int) -> Losses:
        before(number)
        return losses(number)

    loop.run(one_step)
    if panels:
        panels(loop.step)


class JointStep:
    """The losses of one step, as a function of its number."""

    def __init__(
        self,
        policy: Policy,
        encoder: ImageEncoder,
        interface: ConceptSlots,
        config: RunConfig,
        stage: JointStage,
    ) -> None:
        self.policy, self.encoder, self.interface = policy, encoder, interface
        self.stage, self.seed, self.world = stage, config.seed, World.current()
        self.place = PlaceHead(policy.width).to(policy.model.device)
        samples = training_samples(config.data, policy.prompt, config.run)
        self.samples = samples[: stage.samples]
        self.lengths = [len(s.thought or "") + len(s.instruction) for s in self.samples]
        paths = [s.image_path for s in self.samples]
        self.pictures = PictureMemo(policy, encoder, paths, config.data.features)
        self.questions = self.pictures.questions
        learns = stage.rl_weight > 0 and stage.oracle_steps < stage.steps
        self.penalised = learns and stage.grpo.kl > 0
        copied = self.penalised and stage.lora is None  # else its adapters are switched off
        self.reference = frozen_copy(policy) if copied else None

    def __call__(self, step: int) -> Losses:
        """The weighted sum of Eq. 6, and everything worth a line in the log."""
        told = step < self.stage.oracle_steps
        count = self.stage.batch * (self.stage.rollout.group if told else 1)
        chosen = grouped_indices(step, count, self.lengths, self.stage.group, self.seed)
        samples = [self.samples[i] for i in self.world.slice(chosen)]
        questions = self.questions(samples)
        forced = step < self.stage.oracle_steps + self.stage.rollout.forced_steps
        terms, hidden = (
            self.from_oracle(questions) if told else self.from_rollouts(questions, forced)
        )
        means = self.world.means(terms)
        weights = self.stage.weights()
        nothing = 0 * self.place.rows.bias.sum()  # frozen layers, no whole answer: still a gradient
        parts = [weights[name] * means[name] for name in weights if name in means]
        loss = torch.stack([nothing, anchor(hidden), *parts]).sum()
        answers = len(questions.samples) * (1 if told else self.stage.rollout.group)
        figures = {name: mean.detach() for name, mean in means.items()}
        return {"loss": loss, **figures, "answers": torch.tensor(answers)}

    def from_oracle(self, questions: Questions) -> tuple[Terms, Float[Tensor, "B L D"]]:
        """Supervision alone, on the data set's own answers; also the last states."""
        _, sequences = encode_answers(self.policy, questions.samples, self.pictures.visuals)
        states, hidden = self.policy(sequences, questions.visuals, questions.features)
        with torch.set_grad_enabled(self.stage.language_weight > 0):
            language, _ = answer_losses(self.policy, sequences, hidden)
        return {"language": language, **self.segmentation(states, questions)}, hidden

    def from_rollouts(
        self, questions: Questions, forced: bool = False
    ) -> tuple[Terms, Float[Tensor, "B L D"]]:
        """Both halves of Eq. 6, on answers that the policy writes now; also the last states.

        A model that never writes the K tokens by itself earns nothing to learn from: while the form
        is ``forced``, the ending is taught by cross-entropy, and only the thought by its reward.
        """
        group = self.stage.rollout.group
        questions = questions.take(i for i in range(len(questions.samples)) for _ in range(group))
        instructions = [s.instruction for s in questions.samples]
        rollouts = sample_answers(
            self.policy,
            questions.visuals,
            instructions,
            self.stage.rollout,
            questions.features,
            force_form=forced,
        )
        states, hidden = self.policy(rollouts.sequences, questions.visuals, questions.features)
        rewards = self.rewards(rollouts, questions)
        good = rollouts.well_formed
        chosen = ReasoningBatch(*(part[good] for part in states))
        terms = {
            **self.reinforcement(rollouts, questions, hidden, rewards["reward"], forced),
            **(self.segmentation(chosen, questions.take(_rows(good))) if good.any() else {}),
            **rewards,
            "length": rollouts.is_answer.sum(1).float(),
            "well_formed": good.float(),
        }
        return terms, hidden

    def segmentation(self, states: ReasoningBatch, questions: Questions) -> Terms:
        """The supervised terms of well-formed answers."""
        alignment = self.align(states, questions, self.gates(len(states.token_ids)))
        return segmentation_terms(
            self.interface,
            questions.keys,
            alignment,
            questions.samples,
            questions.frames,
            order=self.stage.order_weight,
            place=self.place if self.stage.place_weight > 0 else None,
        )

    def reinforcement(
        self,
        rollouts: Rollouts,
        questions: Questions,
        hidden: Float[Tensor, "B L D"],
        rewards: Float[Tensor, "B"],
        forced: bool = False,
    ) -> Terms:
        """GRPO's loss and the KL divergence of every answer; what a forced ending costs."""
        temperature, group = self.stage.rollout.temperature, self.stage.rollout.group
        tokens = (rollouts.sequences.ids, rollouts.is_answer, temperature)
        new = answer_log_probs(self.policy, hidden, *tokens)
        before = None
        if self.penalised:
            with torch.no_grad(), self.as_it_was() as reference:
                _, states = reference(rollouts.sequences, questions.visuals, questions.features)
                before = answer_log_probs(reference, states, *tokens)
        chosen = rollouts.is_answer
        ending = chosen & (chosen.flip(1).cumsum(1).flip(1) <= len(self.policy.prompt.ending))
        if forced:
            chosen = chosen & ~ending
        groups = rewards.view(-1, group)
        advantage = advantages(groups).flatten()
        loss, kl, clipped = grpo_loss(
            new, rollouts.log_probs, before, chosen, advantage, self.stage.grpo
        )
        decided = groups.std(1, correction=0) > 1e-6
        terms = {"policy": loss, "kl": kl, "clipped": clipped, "groups_that_teach": decided.float()}
        return {**terms, "form": -new[ending]} if forced else terms

    @contextmanager
    def as_it_was(self) -> Iterator[Policy]:
        """The policy as it was when the stage began."""
        if self.reference is not None:
            yield self.reference
            return
        with without_adapters(self.policy):
            yield self.policy

    @torch.no_grad()
    def rewards(self, rollouts: Rollouts, questions: Questions) -> dict[str, Float[Tensor, "B"]]:
        """What each answer earns, from the states it was written with."""
        form = [format_score(self.policy.prompt, ids) for ids in rollouts.ids]
        masks = [0.0] * len(form)
        good = _rows(rollouts.well_formed)
        if good:
            chosen = questions.take(good)
            states = ReasoningBatch(*(part[good] for part in rollouts.states))
            slots = self.align(states, chosen).slots
            counts = slots.confidence_logits.sigmoid() > self.stage.rewards.threshold
            rows, columns = counts.nonzero().unbind(1)
            select = (rows, columns)
            logits = self.interface.decode(chosen.keys, slots, frames=chosen.frames, select=select)
            found = torch.split(logits, counts.sum(1).tolist())
            side, grid = self.encoder.side, 4 * chosen.keys.shape[-1]
            for row, sample, maps in zip(good, chosen.samples, found, strict=True):
                wanted = target_grid(sample.targets, sample.image_hw, side, grid)
                masks[row] = mask_score(maps, wanted.to(maps.device), self.stage.rewards)
        device = questions.keys.device
        parts = torch.tensor(form, device=device), torch.tensor(masks, device=device)
        total = self.stage.rewards.format * parts[0] + self.stage.rewards.mask * parts[1]
        return {"reward": total, "reward_format": parts[0], "reward_mask": parts[1]}

    def align(
        self, states: ReasoningBatch, questions: Questions, gates: Tensor | None = None
    ) -> Alignment:
        """From states to slots, padding left out."""
        grid = questions.keys.shape[-1]
        padding = padding_mask(questions.frames, grid, questions.keys.device)
        return self.interface.align(states, questions.keys, padding=padding, gates=gates)

    def gates(self, count: int) -> Float[Tensor, "B 2"]:
        """Cut off one path of some rows, never both, so that neither path becomes decorative."""
        draw = torch.rand(count, device=self.place.rows.weight.device)
        tokens = draw >= self.stage.drop_tokens
        concepts = draw < 1 - self.stage.drop_concepts
        return torch.stack([tokens, concepts], 1).float()


def _rows(mask: Bool[Tensor, "B"]) -> list[int]:
    return [int(i) for i in mask.nonzero().flatten()]
