"""Teach a policy to judge candidates (Rea2Seg): marked pictures and the score that each deserves.

    finished model -> its candidates on training questions -> score = round(9 IoU)
                   -> question, marked picture -> thought, score       by cross-entropy

The model that finds the candidates is frozen; the judge begins as a copy of its policy. Candidates
are collected once, into STAGE/candidates.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from segcompass.grounding.marking import mark
from segcompass.grounding.segmenters import encoder_of
from segcompass.interfaces.base import Interface
from segcompass.interfaces.candidate_rerank import (
    CandidateRerank,
    CandidateRerankConfig,
    show_attention,
)
from segcompass.interfaces.candidates import iou
from segcompass.io import masks
from segcompass.io.errors import ConfigError
from segcompass.io.images import load_image
from segcompass.io.progress import progress
from segcompass.learning.checks import training_samples
from segcompass.learning.config import RunConfig
from segcompass.learning.engine.distributed import World
from segcompass.learning.engine.loop import Loop, Losses
from segcompass.learning.stages import ScorerStage
from segcompass.learning.train_warmup import answer_losses
from segcompass.learning.watching.watch import stage_observers
from segcompass.model_folder import ModelConfig, Parts, find_model, load_parts, save_model
from segcompass.pipeline import SegCompass
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Policy
from segcompass.reasoning.scorer import TOP, PolicyScorer
from segcompass.types import Rle, Sample, Score, Status

CANDIDATES = "candidates.jsonl"


class Rated(NamedTuple):
    """A candidate for a training question, and the score that it deserves."""

    sample: Sample
    mask: Rle
    score: int  # 0 … 9


class _Nobody:
    """Judges nothing: its candidates are wanted, not a choice among them."""

    def score(self, pictures: Sequence[np.ndarray], _: Sequence[str]) -> list[Score]:
        return [Score(0.0, "", Status.OK)] * len(pictures)


def source_of(config: RunConfig) -> RunConfig:
    """The config of the interface that finds the candidates; of other interfaces, as it is."""
    if isinstance(config.head, CandidateRerankConfig):
        inner = {"interface": config.head.interface, "head": config.head.head}
        return config.model_copy(update=inner)
    return config


def train_scorer(config: RunConfig, stage: ScorerStage, start: Path) -> Path:
    """Collect candidates, train a judge of them, and write the whole model to RUN/model.

    Args:
        config: Of a candidate_rerank; of ``head``, source and sizes are those of ``start``.
        stage: Samples and optimizer.
        start: The model folder that finds the candidates.

    Raises:
        ConfigError: if the config is of another interface, or there are no candidates.
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
    dtype = getattr(torch, config.policy.dtype)
    judge = load_policy(find_model(start) / "policy", head.scorer, dtype=dtype).to(world.device)
    samples = training_samples(config.data, judge.prompt, config.run)[: stage.samples]
    if world.is_main:
        collect(parts, head, samples, folder / CANDIDATES, stage.together)
    world.barrier()
    fit(judge, read(folder / CANDIDATES, samples), config, stage, folder)
    if world.is_main:
        interface: Interface = CandidateRerank(head, parts.interface, PolicyScorer(judge), judge)
        model = ModelConfig(
            name=config.run.name,
            interface=config.interface,
            head=head,
            policy=parts.config.policy,
        )
        save_model(config.run / "model", model, parts.policy, parts.sam, interface)
    world.barrier()
    return config.run / "model"


def collect(
    parts: Parts, head: CandidateRerankConfig, samples: Sequence[Sample], path: Path, together: int
) -> None:
    """Write the candidates of every sample, a line each; goes on behind the lines that are there.

    Args:
        parts: Of the model that finds them; in evaluation mode afterwards.
        head: Which candidates.
        samples: Training questions.
        path: The file to write; its first line says what found the candidates.
        together: Questions that are answered at once.

    Raises:
        ConfigError: if the file holds candidates of another model or choice.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    origin = json.dumps({"model": parts.fingerprint, **head.candidates.model_dump()})
    known = _whole_lines(path)
    if known[:1] not in ([], [origin]):
        raise ConfigError(
            f"{path} holds candidates of another model or choice ({known[0]}); delete it, or set "
            "another `run` folder"
        )
    show_attention(parts.policy, head.candidates)
    interface = CandidateRerank(head, parts.interface, _Nobody())
    model = SegCompass(parts.policy, encoder_of(parts.sam), interface).eval()
    model.to(World.current().device)
    with path.open("w", encoding="utf-8") as file, progress("candidates") as update:
        file.writelines(f"{line}\n" for line in known or [origin])
        for start in range(max(0, len(known) - 1), len(samples), together):
            batch = samples[start : start + together]
            for sample, found in zip(batch, _masks(model, batch), strict=True):
                row = {
                    "sample": sample.sample_id,
                    "masks": found,
                    "scores": deserved(sample, found),
                }
                file.write(json.dumps(row) + "\n")
            file.flush()
            update(start + len(batch), len(samples))


def _masks(model: SegCompass, batch: Sequence[Sample]) -> Iterator[list[Rle]]:
    """The candidates of a batch."""
    answers = model.predict_batch([s.image_path for s in batch], [s.instruction for s in batch])
    for answer in answers:
        candidates = () if answer.candidates is None else answer.candidates.masks
        yield [masks.encode(mask) for mask in candidates]


def deserved(sample: Sample, found: Sequence[Rle]) -> list[int]:
    """What each candidate would score if the judge knew the targets: nine times its IoU, rounded.

    Ignored pixels count neither way.
    """
    target = masks.union(sample.targets, sample.image_hw)
    counts = np.ones_like(target) if sample.ignore is None else ~masks.decode(sample.ignore)
    return [int(TOP * iou(masks.decode(rle) & counts, target & counts) + 0.5) for rle in found]


def read(path: Path, samples: Sequence[Sample]) -> list[Rated]:
    """The collected candidates; raises ConfigError where they are of other samples, or none."""
    rows = [json.loads(line) for line in _whole_lines(path)[1:]]
    if [row["sample"] for row in rows] != [sample.sample_id for sample in samples]:
        raise ConfigError(
            f"{path} holds candidates of other samples; delete it, or set another `run` folder"
        )
    rated = [
        Rated(sample, mask, score)
        for sample, row in zip(samples, rows, strict=True)
        for mask, score in zip(row["masks"], row["scores"], strict=True)
    ]
    if not rated:
        raise ConfigError(f"{path} holds no candidate; train the model that is to find them first")
    return rated


def fit(
    judge: Policy, rated: Sequence[Rated], config: RunConfig, stage: ScorerStage, folder: Path
) -> None:
    """Train the judge on marked pictures, by cross-entropy over thought and score."""
    world = World.current()
    judge.requires_grad_(True)
    judge.backbone.vision.requires_grad_(stage.train_vision)
    observers = stage_observers(config, folder)
    parts = {"policy": judge.model}
    loop = Loop(folder, "scorer", parts, stage, config.seed, observers=observers)
    loop.resume()
    scores = [one.score for one in rated]

    def losses(step: int) -> Losses:
        chosen = world.slice(balanced_indices(step, stage.batch, scores, config.seed))
        batch = [rated[i] for i in chosen]
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


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file, without one that a killed run left unfinished."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return lines
