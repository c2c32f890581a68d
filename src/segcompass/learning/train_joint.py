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

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.interfaces.base import Interface
from segcompass.learning.answers import Answers
from segcompass.learning.checks import training_samples
from segcompass.learning.config import RunConfig
from segcompass.learning.corpus import encode_answers, repeated
from segcompass.learning.engine import reference
from segcompass.learning.engine.distributed import World, split
from segcompass.learning.engine.freezing import freeze, frozen_copy
from segcompass.learning.engine.loop import Loop, Losses, grouped_indices
from segcompass.learning.engine.lora import reference as without_adapters
from segcompass.learning.engine.sharding import anchor, enable_checkpointing, shard
from segcompass.learning.engine.vllm_rollouts import VllmSampler, open_engine
from segcompass.learning.grpo import advantages, answer_log_probs, grpo_loss
from segcompass.learning.questions import PictureMemo, Questions
from segcompass.learning.rollouts import Sampler, sample_answers
from segcompass.learning.segmentation import PlaceHead, Terms
from segcompass.learning.stages import JointStage
from segcompass.learning.teachers import Teacher, rows_of
from segcompass.learning.teaching import teacher_of
from segcompass.learning.train_warmup import answer_losses, answer_tokens
from segcompass.learning.watching.watch import joint_observers, joint_panels
from segcompass.pipeline import SegCompass
from segcompass.reasoning.policy import Policy
from segcompass.types import ReasoningBatch


def train_joint(
    policy: Policy,
    encoder: ImageEncoder,
    interface: Interface,
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
    begins = stage.oracle_steps  # of reinforcement
    if step.reference is not None and loop.step > begins > 0:
        reference.restore(step.reference, policy, folder)

    def one_step(number: int) -> Losses | Iterable[Losses]:
        before(number)
        if step.reference is not None and number == begins > 0:
            reference.renew(step.reference, policy, folder, number, step.world)
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
        interface: Interface,
        config: RunConfig,
        stage: JointStage,
    ) -> None:
        self.policy, self.encoder, self.interface = policy, encoder, interface
        self.stage, self.seed, self.world = stage, config.seed, World.current()
        self.place = PlaceHead(interface.query_width or policy.width).to(policy.model.device)
        place = self.place if stage.place_weight > 0 else None
        self.teacher: Teacher = teacher_of(policy, encoder, interface, stage, place)
        samples = training_samples(config.data, policy.prompt, config.run)
        self.samples = repeated(samples[: stage.samples], stage.no_target_repeats)
        self.lengths = [len(s.thought or "") + len(s.instruction) for s in self.samples]
        paths = [s.image_path for s in self.samples]
        self.pictures = PictureMemo(policy, encoder, paths, config.data.features)
        self.questions = self.pictures.questions
        learns = stage.rl_weight > 0 and stage.oracle_steps < stage.steps
        self.penalised = learns and stage.grpo.kl > 0
        # Adapters can be switched off, which gives the policy as it was before any step.
        copied = self.penalised and (stage.lora is None or stage.oracle_steps > 0)
        self.reference = frozen_copy(policy) if copied else None
        self.sampler: Sampler | None = None
        if stage.rollout.backend == "vllm":
            engine = open_engine(policy, stage.rollout, config.run / "vllm", self.seed)
            self.sampler = VllmSampler(engine)

    def __call__(self, step: int) -> Iterator[Losses]:
        """The weighted sum of Eq. 6, and everything worth a line in the log, by micro-batches."""
        told = step < self.stage.oracle_steps
        count = self.stage.batch * (self.stage.rollout.group if told else 1)
        chosen = grouped_indices(step, count, self.lengths, self.stage.group, self.seed)
        questions = self.questions([self.samples[i] for i in self.world.slice(chosen)])
        forced = step < self.stage.oracle_steps + self.stage.rollout.forced_steps
        answers, figures = (self.given(questions), {}) if told else self.written(questions, forced)
        if self.stage.rehearse and not told:
            answers = [*answers, *self.given(questions)]
        counts = self.counts(answers, figures)
        totals = self.world.totals(counts)
        for part in self.micro_batches(answers):
            terms, hidden = self.terms(part)
            terms, figures = {**terms, **figures}, {}
            for name, values in terms.items():
                counts[name] = counts.get(name, 0) - values.numel()
            yield self.losses(terms, totals, hidden, self.stage.weights(step))
        assert not any(counts.values()), f"values that were announced and not there: {counts}"

    def losses(
        self,
        terms: Terms,
        totals: Mapping[str, int],
        hidden: Float[Tensor, "B L D"],
        weights: Mapping[str, float],
    ) -> Losses:
        """What a micro-batch adds to the step's loss and figures."""
        shares = self.world.shares(terms, totals)
        nothing = 0 * self.place.rows.bias.sum()  # frozen layers, no whole answer: still a gradient
        parts = [weights[name] * shares[name] for name in weights if name in shares]
        loss = torch.stack([nothing, anchor(hidden), *parts]).sum()
        figures = {name: share.detach() for name, share in shares.items()}
        return {"loss": loss, **figures, "answers": torch.tensor(len(hidden))}

    def given(self, questions: Questions) -> list[Answers]:
        """The data set's own answers."""
        _, sequences = encode_answers(
            self.policy, questions.samples, self.pictures.visuals, self.teacher.conclude
        )
        is_answer = answer_tokens(sequences)
        return [Answers(questions, sequences, is_answer, is_answer.any(1))]

    def written(self, questions: Questions, forced: bool) -> tuple[list[Answers], Terms]:
        """Answers that the policy writes now, and what is to be logged of them."""
        group, config = self.stage.rollout.group, self.stage.rollout
        rows = [i for i in range(len(questions.samples)) for _ in range(group)]
        answers, rewards, sample = [], [], self.sampler or sample_answers
        for part in self.parts(rows, config.batch):
            asked = questions.take(part)
            texts = [s.instruction for s in asked.samples]
            rollouts = sample(
                self.policy, asked.visuals, texts, config, asked.features, force_form=forced
            )
            rewards.append(self.teacher.rewards(rollouts, asked))
            sequences, is_answer, log_probs, _, good, *_ = rollouts
            answers.append(Answers(asked, sequences, is_answer, good, log_probs, forced=forced))
        figures = {name: torch.cat([r[name] for r in rewards]) for name in rewards[0]}
        groups = figures["reward"].view(-1, group)
        gains = torch.split(advantages(groups).flatten(), [len(a.well_formed) for a in answers])
        figures |= {
            "groups_that_teach": (groups.std(1, correction=0) > 1e-6).float(),
            "length": torch.cat([a.is_answer.sum(1).float() for a in answers]),
            "well_formed": torch.cat([a.well_formed.float() for a in answers]),
        }
        return [a._replace(advantages=g) for a, g in zip(answers, gains, strict=True)], figures

    def parts(self, rows: Sequence[int], limit: int | None) -> list[list[int]]:
        """Rows in parts of at most ``limit``, as many parts on every rank, none of them empty."""
        if limit is None:
            return [list(rows)]
        counts = self.world.gather_objects(len(rows))
        return split(rows, min(math.ceil(max(counts) / limit), min(counts)))

    def micro_batches(self, answers: Sequence[Answers]) -> Iterator[Answers]:
        """Parts that go through the policy together."""
        for whole in answers:
            rows = range(len(whole.well_formed))
            parts = self.parts(rows, self.stage.micro_batch)
            yield from (whole.take(part) for part in parts) if len(parts) > 1 else [whole]

    def counts(self, answers: Sequence[Answers], figures: Terms) -> dict[str, int]:
        """How many values each term of the step has on this rank: what means are taken over."""
        good = [a.questions.samples[i] for a in answers for i in rows_of(a.well_formed)]
        counts = {**self.teacher.counts(good), **{n: v.numel() for n, v in figures.items()}}
        if given := [a for a in answers if a.advantages is None]:
            counts["language"] = sum(int(a.is_answer.sum()) for a in given)
        if written := [a for a in answers if a.advantages is not None]:
            rows = sum(len(a.well_formed) for a in written)
            counts |= dict.fromkeys(("policy", "kl", "clipped"), rows)
            if written[0].forced:
                counts["form"] = sum(int(self.form_tokens(a).sum()) for a in written)
        return counts

    def terms(self, part: Answers) -> tuple[Terms, Float[Tensor, "B L D"]]:
        """Both halves of Eq. 6, from one pass with gradient; also its last states."""
        questions, good = part.questions, part.well_formed
        states, hidden = self.policy(part.sequences, questions.visuals, questions.features)
        terms = (
            self.imitation(part, hidden)
            if part.advantages is None
            else self.reinforcement(part, hidden)
        )
        if good.any():
            chosen = ReasoningBatch(*(values[good] for values in states))
            terms |= self.teacher.supervise(chosen, questions.take(rows_of(good)))
        return terms, hidden

    def imitation(self, part: Answers, hidden: Float[Tensor, "B L D"]) -> Terms:
        """Cross-entropy of the data set's own answers."""
        with torch.set_grad_enabled(self.stage.language_weight > 0):
            language, _ = answer_losses(self.policy, part.sequences, hidden)
        return {"language": language}

    def reinforcement(self, part: Answers, hidden: Float[Tensor, "B L D"]) -> Terms:
        """GRPO's loss and the KL divergence of every answer; what a forced form costs.

        A model that never writes the form by itself earns nothing to learn from: while the form
        is forced, it is taught by cross-entropy, and only the thought by its reward.
        """
        assert part.log_probs is not None and part.advantages is not None
        tokens = (part.sequences.ids, part.is_answer, self.stage.rollout.temperature)
        new = answer_log_probs(self.policy, hidden, *tokens)
        before = None
        if self.penalised:
            visuals, features = part.questions.visuals, part.questions.features
            with torch.no_grad(), self.as_it_was() as former:
                _, states = former(part.sequences, visuals, features)
                before = answer_log_probs(former, states, *tokens)
        form = self.form_tokens(part)
        chosen = part.is_answer & ~form if part.forced else part.is_answer
        loss, kl, clipped = grpo_loss(
            new, part.log_probs, before, chosen, part.advantages, self.stage.grpo
        )
        terms = {"policy": loss, "kl": kl, "clipped": clipped}
        return {**terms, "form": -new[form]} if part.forced else terms

    def form_tokens(self, part: Answers) -> Bool[Tensor, "B L"]:
        """The tokens that open and close each answer: what is forced with the form."""
        prompt, is_answer = self.policy.prompt, part.is_answer
        opens = is_answer.cumsum(1) <= len(prompt.open_ids)
        closes = is_answer.flip(1).cumsum(1).flip(1) <= len(prompt.ending)
        return is_answer & (opens | closes)

    @contextmanager
    def as_it_was(self) -> Iterator[Policy]:
        """The policy as it was when reinforcement began: a copy, or itself without adapters."""
        if self.reference is not None:
            yield self.reference
            return
        rows = self.policy.token_rows
        with without_adapters(self.policy), rows.off() if rows is not None else nullcontext():
            yield self.policy
