"""Train the sparse autoencoder on the frozen policy's states (Eq. 7).

Tokens of many sequences come in a shuffled stream (`activations/stream.py`): no batch is the
tokens of one picture. Padding, end-of-text and concentration tokens are left out: the SAE never
sees them later either. So are control tokens (`mask_control`), which it does see later. Under
torchrun each rank reads its own slice of the data; gradients and counts are those of all ranks'
tokens together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder
from segcompass.data.documents import DocumentSet
from segcompass.io.files import write_whole
from segcompass.learning.activations.cache import ActivationCache, Tokens
from segcompass.learning.activations.sae_loop import SaeLoop, input_scale, new_sae
from segcompass.learning.activations.sae_report import as_table, measure_fidelity
from segcompass.learning.activations.sources import DocumentSource, SampleSource, Source
from segcompass.learning.activations.stream import (
    Groups,
    StateReader,
    Statistics,
    TokenStream,
    measure,
    plan_stream,
)
from segcompass.learning.checks import training_samples
from segcompass.learning.config import RunConfig
from segcompass.learning.engine.distributed import World
from segcompass.learning.stages import SaeStage
from segcompass.learning.watching.watch import stage_observers
from segcompass.reasoning.policy import Policy

REPORT = "sae_report.json"


def train_sae(
    policy: Policy, config: RunConfig, stage: SaeStage, folder: Path
) -> SparseAutoencoder:
    """Train an SAE and return it with its input scale folded in; the report goes to FOLDER.

    Raises:
        DataError: if samples or documents are missing, or give no token.
    """
    policy.requires_grad_(False)
    world = World.current()
    reader, groups = open_states(policy, config, stage)
    found = measure(reader, groups, stage.outliers, stage.statistics)
    scale = input_scale(found, stage)
    sae = new_sae(found, stage, config.seed, scale).to(policy.model.device)
    observers = stage_observers(config, folder)
    loop = SaeLoop(folder, sae, stage, config.seed, scale, world, observers)
    loop.resume()
    was_finished = loop.step >= stage.steps
    stream = open_stream(reader, groups, found, stage, config.seed, world)
    with _matmul_precision(stage.matmul):
        if not was_finished:
            loop.prepare(stream)
        loop.run(lambda step: loop.losses(stream.batch(step)))
    if stage.unit_decoder:
        loop.normalise()
    sae.fold_input_scale(scale)
    if was_finished and (folder / REPORT).is_file():
        return sae
    report = measure_fidelity(policy, sae, reader, groups.held_out, found, stage.outliers, world)
    if world.is_main:
        dead = loop.clock.dead(min(stage.dead_after, loop.clock.seen))
        facts = {
            "dead": float(dead.float().mean()),
            "training_tokens": loop.clock.seen,
            "steps": stage.steps,
            "latents": stage.latents,
            "l1": stage.l1,
        }
        write_whole(folder / REPORT, json.dumps({**report, **facts}, indent=2) + "\n")
        print(as_table({**report, **facts}), file=sys.stderr)
    return sae


def open_states(policy: Policy, config: RunConfig, stage: SaeStage) -> tuple[StateReader, Groups]:
    """The configured sources, and the order in which they are read."""
    sources: list[Source] = []
    if stage.documents is None or stage.documents_share < 1:
        samples = training_samples(config.data, policy.prompt, config.run)
        source = SampleSource(policy, samples, config.seed, stage.answers)
        wanted = None if stage.samples is None else stage.samples + stage.held_out
        source.samples = source.samples[:wanted]
        sources.append(source)
    if stage.documents is not None:
        documents = DocumentSet(stage.documents, config.seed)
        sources.append(DocumentSource(policy, documents, stage.max_tokens))
    counts = [len(source) for source in sources]
    groups = Groups(counts, stage.documents_share, stage.sequences, stage.held_out)
    cache = None
    if stage.cache is not None:
        budget = int(stage.cache_gb * 1e9)
        cache = ActivationCache(stage.cache, budget, World.current().size)
    reader = StateReader(
        policy, sources, cache, memory=stage.buffer, mask_control=stage.mask_control
    )
    return reader, groups


def open_stream(
    reader: StateReader,
    groups: Groups,
    found: Statistics,
    stage: SaeStage,
    seed: int,
    world: World,
) -> TokenStream:
    """The stream of this rank's tokens."""
    if len(groups) * found.tokens > stage.buffer:
        reader.forget()  # the set is read piece by piece; only a small one stays in memory
    plan = plan_stream(
        max(1, len(groups) // world.size),
        found.tokens,
        buffer=stage.buffer,
        batch=len(world.slice(range(stage.batch))),
        shuffle=stage.shuffle,
    )

    def read(number: int) -> Tokens:
        tokens = reader.read(groups.at(number))
        return tokens.select(found.is_usual(tokens.states, stage.outliers))

    return TokenStream(read, plan, seed, world.rank, world.size)


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """Products of float32 matrices in this precision for the duration of the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
