"""Teach a policy to judge candidates (Rea2Seg): marked pictures and the score that each deserves.

    finished model -> its candidates on training questions -> score = round(9 IoU)
                   -> question, marked picture -> thought, score       by cross-entropy
                   -> on the last questions, about other pictures: the margin

The model that finds the candidates is frozen; the judge begins as a copy of its policy, or as
another one. Candidates are collected once, into STAGE/candidates.jsonl. STAGE/margin.json tells
what the judge is worth on questions that it was not trained to judge
(`candidate_questions.set_apart`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from segcompass.grounding.marking import mark
from segcompass.interfaces.base import Interface
from segcompass.interfaces.candidate_rerank import CandidateRerank, CandidateRerankConfig
from segcompass.io import masks
from segcompass.io.errors import ConfigError
from segcompass.io.files import write_whole
from segcompass.io.images import load_image
from segcompass.learning.candidate_questions import CANDIDATES, Question, collect, set_apart
from segcompass.learning.checks import training_samples
from segcompass.learning.config import RunConfig
from segcompass.learning.engine.distributed import World
from segcompass.learning.engine.loop import Loop, Losses
from segcompass.learning.margin import best_margin, figures, rate
from segcompass.learning.planning.features import limit_pixels
from segcompass.learning.stages import ScorerStage
from segcompass.learning.train_warmup import answer_losses
from segcompass.learning.watching.watch import stage_observers
from segcompass.model_folder import Parts, load_parts, save_model
from segcompass.reasoning.backbones import QwenBackbone
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Policy
from segcompass.reasoning.scorer import PolicyScorer, asking_for_scores
from segcompass.types import Rle, Sample

MARGIN = "margin.json"


class Rated(NamedTuple):
    """A candidate for a training question, and the score that it deserves."""

    sample: Sample
    mask: Rle
    score: int  # 0 … 9


def source_of(config: RunConfig) -> RunConfig:
    """The config of the interface that finds the candidates; of other interfaces, as it is."""
    if isinstance(config.head, CandidateRerankConfig):
        inner = {"interface": config.head.interface, "head": config.head.head}
        return config.model_copy(update=inner)
    return config


def train_scorer(config: RunConfig, stage: ScorerStage, start: Path) -> Path:
    """Collect candidates, train a judge of them, and write the whole model to RUN/model.

    With the model are saved how its judge is asked, and the margin that the judge has earned
    unless the config gives one.

    Args:
        config: Of a candidate_rerank; of ``head``, source and sizes are those of ``start``.
        stage: Samples and optimizer.
        start: The model folder or preset that finds the candidates.

    Raises:
        CheckpointError: if model or judge cannot be loaded.
        ConfigError: if the config is of another interface, nothing says how the judge is asked, or
            there are no candidates.
        DataError: if the data is missing or broken.
        DivergenceError: if a loss is no longer finite.
    """
    if not isinstance(config.head, CandidateRerankConfig):
        raise ConfigError(
            f"interface {config.interface} has no scorer; set interface: candidate_rerank"
        )
    world, folder = World.current(), config.run / "stages/scorer"
    parts = load_parts(start, dtype=config.policy.dtype)
    inner = {"interface": parts.config.interface, "head": parts.config.head}
    head = config.head.model_copy(update=inner)
    judge = start_judge(parts, head, config, stage).to(world.device)
    samples = training_samples(config.data, judge.prompt, config.run)
    chosen = set_apart(samples, stage.samples, stage.held_out)
    training, apart = collect(parts, head, *chosen, folder, stage.together)
    fit(judge, rated(training, folder), config, stage, folder)
    scorer = PolicyScorer(judge.eval(), together=head.together)
    verdicts = rate(apart, scorer, parts.config.threshold)
    margin = best_margin(verdicts) if head.margin is None else head.margin
    head = head.model_copy(update={"margin": margin, "scorer": judge.config})
    if world.is_main:
        told = figures(verdicts, margin) | {"given": config.head.margin is not None}
        write_whole(folder / MARGIN, json.dumps(told, indent=2) + "\n")
        interface: Interface = CandidateRerank(head, parts.interface, scorer, judge)
        own = {"name": config.run.name, "interface": config.interface, "head": head}
        model = parts.config.model_copy(update=own)
        save_model(config.run / "model", model, parts.policy, parts.sam, interface)
    world.barrier()
    return config.run / "model"


def start_judge(
    parts: Parts, head: CandidateRerankConfig, config: RunConfig, stage: ScorerStage
) -> Policy:
    """The judge before its training: a copy of the source's policy, or the one that is configured.

    Another policy is asked in the chat of its own family, unless ``head.scorer`` says how.
    """
    source = parts.config.policy
    if stage.judge is None:
        backbone = copy.deepcopy(parts.policy.backbone)
        return Policy(backbone, parts.policy.tokenizer, head.asking(source)).eval()
    asked = head.scorer or asking_for_scores(stage.judge, source)
    judge = load_policy(stage.judge, asked, dtype=getattr(torch, config.policy.dtype))
    if isinstance(judge.backbone, QwenBackbone):  # others see every picture at one size
        limit_pixels(judge.backbone, config.data.image_pixels)
    return judge


def rated(questions: Sequence[Question], folder: Path) -> list[Rated]:
    """The candidates of all questions; raises ConfigError where there are none."""
    found = [
        Rated(question.sample, mask, score)
        for question in questions
        for mask, score in zip(question.masks, question.scores, strict=True)
    ]
    if not found:
        raise ConfigError(
            f"{folder / CANDIDATES} holds no candidate to train on; collect from more questions, "
            "or train the model that is to find them first"
        )
    return found


def fit(
    judge: Policy, known: Sequence[Rated], config: RunConfig, stage: ScorerStage, folder: Path
) -> None:
    """Train the judge on marked pictures, by cross-entropy over thought and score."""
    world = World.current()
    judge.requires_grad_(True)
    judge.backbone.vision.requires_grad_(stage.train_vision)
    observers = stage_observers(config, folder)
    parts = {"policy": judge.model}
    loop = Loop(folder, "scorer", parts, stage, config.seed, observers=observers)
    loop.resume()
    scores = [one.score for one in known]

    def losses(step: int) -> Losses:
        chosen = world.slice(balanced_indices(step, stage.batch, scores, config.seed))
        batch = [known[i] for i in chosen]
        visuals = [
            judge.backbone.prepare(mark(load_image(s.image_path), masks.decode(mask)))
            for s, mask, _ in batch
        ]
        sequences = judge.encode(
            visuals,
            [one.sample.instruction for one in batch],
            [one.sample.thought or "" for one in batch],
            [str(one.score) for one in batch],
        )
        _, hidden = judge(sequences, visuals)
        tokens, right = answer_losses(judge, sequences, hidden)
        means = world.means({"loss": tokens, "accuracy": right.float()})
        return {"loss": means["loss"], "accuracy": means["accuracy"].detach()}

    loop.run(losses)


def balanced_indices(step: int, batch: int, scores: Sequence[int], seed: int) -> list[int]:
    """Candidates of a step: every score that occurs is equally likely, and so its candidates."""
    draw = np.random.default_rng((seed, step))
    labels = np.asarray(scores)
    wanted = draw.choice(np.unique(labels), batch)
    return [int(draw.choice(np.flatnonzero(labels == score))) for score in wanted]
