"""Training a sparse autoencoder: tokens/s of our step against SAELens's trainer.

    python benchmarks/sae_train.py [--json] [--steps 600] [--batch 1024]

Both sides start from the same weights and take the same batches of the same stored activations, in
one run, in turns of ten steps, with the same loss (Eq. 7, activations weighed by decoder norms),
rate, clipping and L1 warm-up, in fp32:

    ours      SaeLoop: fused loss, fp32 AdamW, figures of the log, clock of the latents
    baseline  sae_lens.training.sae_trainer.SAETrainer.step on a StandardTrainingSAE (extra
              `interop`); where SAELens is not installed, plain autograd on
              SparseAutoencoder.loss with torch's AdamW, and the output says so

The activations are sparse sums of a random dictionary around a mean, stored in bf16 shards as
`train sae` caches them. Both sides' explained variance and L0 at the end are told; if they differ
by more than rounding explains, the two did not do the same work and nothing is reported. Memory is
the peak of what one step allocates and gives back (measuring.py).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import machine, new_parser, report, row, transient_bytes
from torch import Tensor

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.learning.activations.cache import ActivationCache, Tokens
from segcompass.learning.activations.sae_loop import SaeLoop
from segcompass.learning.activations.stream import StreamPlan, TokenStream
from segcompass.learning.engine.distributed import World
from segcompass.learning.stages import SaeStage

TOLERANCE = 0.02  # of explained variance, and relative of L0
TURN = 10  # steps of one side before the other's turn
SHARD = 4096  # tokens
RATE, BETAS, CLIP = 1e-3, (0.9, 0.98), 1.0


class Side(NamedTuple):
    """One way to train: a step on a batch of stored tokens, and the SAE as it stands."""

    name: str
    step: Callable[[int], object]
    reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]]  # states -> reconstruction, activations


def store(folder: Path, options: argparse.Namespace) -> tuple[ActivationCache, Tensor]:
    """Write shards of activations; returns them and their mean."""
    generator = torch.Generator().manual_seed(0)
    cache = ActivationCache(folder, 1 << 40)
    directions = torch.randn(options.d_sae // 2, options.d_in, generator=generator)
    directions = torch.nn.functional.normalize(directions, dim=-1)
    centre = torch.randn(options.d_in, generator=generator)
    total = torch.zeros(options.d_in)
    for shard in range(options.shards):
        chosen = torch.randint(len(directions), (SHARD, options.active), generator=generator)
        strength = torch.rand(SHARD, options.active, generator=generator).log().neg_()
        states = torch.einsum("nk,nkd->nd", strength, directions[chosen]) + centre
        states *= (options.d_in / (2.0 * options.active)) ** 0.5  # norm about sqrt(d_in)
        cache.write(str(shard), Tokens(states, torch.ones(SHARD, dtype=torch.uint8)))
        total += states.mean(0) / options.shards
    return cache, total


def stream_of(cache: ActivationCache, options: argparse.Namespace) -> TokenStream:
    """Shuffled batches of the shards; each side has its own, and they agree."""

    def read(number: int) -> Tokens:
        tokens = cache.read(str(number % options.shards), options.d_in)
        assert tokens is not None
        return tokens

    groups = max(1, options.shards // 4)
    steps = max(1, groups * SHARD // options.batch)
    return TokenStream(read, StreamPlan(groups, steps, options.batch, 1 << 40, True), seed=0)


def start_of(mean: Tensor, options: argparse.Namespace) -> SparseAutoencoder:
    """The weights that both sides begin with."""
    torch.manual_seed(0)
    sizes = SparseAutoencoderConfig(
        d_in=options.d_in, d_sae=options.d_sae, apply_b_dec_to_input=True
    )
    return SparseAutoencoder(sizes, mean=mean)


def ours(
    sae: SparseAutoencoder, stream: TokenStream, folder: Path, options: argparse.Namespace
) -> Side:
    """The loop of `train sae`."""
    stage = SaeStage(
        steps=options.steps,
        batch=options.batch,
        learning_rate=RATE,
        warmup=0.0,
        final_division=1.0,
        weight_decay=0.0,
        betas=BETAS,
        clip=CLIP,
        latents=options.d_sae,
        l1=options.l1,
        l1_warmup=options.warmup / options.steps,
        buffer=1 << 40,
    )
    loop = SaeLoop(folder, sae, stage, 0, 1.0, World(0, 1, torch.device("cpu")))
    return Side(
        "ours",
        lambda step: loop._one_step(lambda _: loop.losses(stream.batch(step))),
        lambda z: tuple(sae(z)),  # type: ignore[arg-type,return-value]
    )


def saelens(sae: SparseAutoencoder, stream: TokenStream, options: argparse.Namespace) -> Side:
    """SAELens's own trainer on its own SAE; raises ImportError where it is not installed."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    theirs = StandardTrainingSAE(
        StandardTrainingSAEConfig(
            d_in=options.d_in,
            d_sae=options.d_sae,
            apply_b_dec_to_input=True,
            l1_coefficient=options.l1,
            l1_warm_up_steps=options.warmup,
        )
    )
    theirs.load_state_dict(sae.state_dict())
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=options.steps * options.batch,
            train_batch_size_samples=options.batch,
            lr=RATE,
            lr_end=RATE,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
        ),
        theirs,
        data_provider=iter(()),
    )

    for schedule in trainer.coefficient_schedulers.values():
        schedule.step()  # theirs begins with 0, ours with a first part of the weight

    def step(number: int) -> None:
        trainer.step(stream.batch(number).states.float())
        trainer.n_training_steps += 1

    def reconstruct(z: Tensor) -> tuple[Tensor, Tensor]:
        activations = theirs.encode(z)
        return theirs.decode(activations), activations

    return Side(f"sae-lens {importlib.metadata.version('sae-lens')}", step, reconstruct)


def plain(sae: SparseAutoencoder, stream: TokenStream, options: argparse.Namespace) -> Side:
    """Autograd through the dense formulation."""
    optimizer = torch.optim.AdamW(sae.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0)

    def step(number: int) -> None:
        rise = min(1.0, (number + 1) / max(1, options.warmup))
        z = stream.batch(number).states.float()
        sae.loss(z, options.l1 * rise, weigh_by_decoder=True).total.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return Side("plain dense formulation", step, lambda z: tuple(sae(z)))  # type: ignore[arg-type,return-value]


def baseline(sae: SparseAutoencoder, stream: TokenStream, options: argparse.Namespace) -> Side:
    """SAELens where it is installed."""
    try:
        return saelens(sae, stream, options)
    except ImportError:
        return plain(sae, stream, options)


def train(sides: Sequence[Side], steps: int) -> list[list[float]]:
    """Seconds of every step of every side, in turns."""
    seconds: list[list[float]] = [[] for _ in sides]
    for first in range(0, steps, TURN):
        for side, times in zip(sides, seconds, strict=True):
            for number in range(first, min(first + TURN, steps)):
                start = time.perf_counter()
                side.step(number)
                times.append(time.perf_counter() - start)
    return seconds


@torch.no_grad()
def quality(side: Side, z: Tensor) -> dict[str, float]:
    """Explained variance and L0 on some tokens."""
    rebuilt, activations = side.reconstruct(z)
    error, variance = (z - rebuilt).square().sum(), (z - z.mean(0)).square().sum()
    return {
        "explained_variance": float(1 - error / variance),
        "l0": float((activations > 0).sum(-1).float().mean()),
    }


def check_equal(found: dict[str, float], wanted: dict[str, float]) -> None:
    """Raises SystemExit when the sides did not learn the same."""
    variance = abs(found["explained_variance"] - wanted["explained_variance"])
    density = abs(found["l0"] - wanted["l0"]) / max(1.0, wanted["l0"])
    if not (variance <= TOLERANCE and density <= TOLERANCE):
        sys.exit(f"the sides learned different things: {found} and {wanted}; nothing is reported")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the figures in the format of all benchmarks."""
    with tempfile.TemporaryDirectory() as name:
        cache, mean = store(Path(name) / "states", options)
        sae = [start_of(mean, options) for _ in range(2)]
        streams = [stream_of(cache, options) for _ in range(2)]
        sides = [
            ours(sae[0], streams[0], Path(name) / "run", options),
            baseline(sae[1], streams[1], options),
        ]
        seconds = train(sides, options.steps)
        held = cache.read(str(options.shards - 1), options.d_in)
        assert held is not None
        learned = [quality(side, held.states.float()) for side in sides]
        check_equal(*learned)
        last = options.steps - 1
        peaks = [transient_bytes(lambda side=side: side.step(last)) for side in sides]
    late = options.steps * 2 // 3
    rows = [
        row(
            "tokens_per_second", "tokens/s", *(_rate(s, options.batch) for s in seconds), more=True
        ),
        row(
            "tokens_per_second_late",
            "tokens/s",
            *(_rate(s[late:], options.batch) for s in seconds),
            more=True,
        ),
        row("memory", "bytes", *peaks),
    ]
    names = ("steps", "batch", "d_in", "d_sae", "l1", "shards")
    settings = {name: getattr(options, name) for name in names}
    settings |= {
        "baseline": sides[1].name,
        "ours_learned": learned[0],
        "baseline_learned": learned[1],
    }
    return {
        "name": "sae_train",
        "machine": machine(),
        "settings": settings,
        "rows": rows,
    }


def _rate(seconds: Sequence[float], batch: int) -> float:
    return batch * len(seconds) / sum(seconds)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; the default sizes are nano's."""
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=1024, help="tokens of a step")
    parser.add_argument("--d-in", type=int, default=192, help="width D of the states")
    parser.add_argument("--d-sae", type=int, default=2048, help="latents S")
    parser.add_argument("--active", type=int, default=16, help="true features in a state")
    parser.add_argument("--l1", type=float, default=3.0)
    parser.add_argument("--warmup", type=int, default=50, help="steps in which the L1 weight rises")
    parser.add_argument("--shards", type=int, default=64, help=f"stored, of {SHARD} tokens each")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    report(measure, parse())
