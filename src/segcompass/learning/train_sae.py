"""Train the sparse autoencoder on the frozen policy's states (Eq. 7).

Tokens of many sequences are gathered into one shuffled buffer, so that no batch is the tokens of
one picture. Padding and concentration tokens are left out: the SAE never sees them later either.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.interfaces.concept_slots import read_by_sae
from segcompass.learning.config import RunConfig, SaeStage
from segcompass.learning.corpus import encode_answers, read_samples, visual_memo
from segcompass.learning.loop import Loop, Losses, batch_indices
from segcompass.reasoning.policy import Policy
from segcompass.types import Sample


def train_sae(
    policy: Policy, config: RunConfig, stage: SaeStage, folder: Path
) -> SparseAutoencoder:
    """Train an SAE and return it with its input scale folded in."""
    samples = read_samples(config.data)
    order = batch_indices(0, min(stage.samples, len(samples)), len(samples), config.seed)
    states = collect_states(policy, [samples[i] for i in order])
    mean = states.mean(0)
    # Inputs of norm sqrt(D) make learning rate and L1 weight independent of the policy.
    scale = float(policy.width**0.5 / (states - mean).norm(dim=-1).mean())
    torch.manual_seed(config.seed)
    sizes = SparseAutoencoderConfig(
        d_in=policy.width,
        d_sae=stage.latents,
        threshold=stage.threshold,
        apply_b_dec_to_input=True,  # centred, so no latent is spent on the mean
    )
    sae = SparseAutoencoder(sizes, mean=mean * scale)
    loop = Loop(folder, "sae", {"sae": sae}, stage, config.seed)
    loop.resume()

    def losses(step: int) -> Losses:
        chosen = batch_indices(step, stage.batch, len(states), config.seed)
        tokens = states[chosen] * scale
        rise = min(1.0, (step + 1) / max(1.0, stage.l1_warmup * stage.steps))
        result = sae.loss(tokens, stage.l1 * rise, weigh_by_decoder=True)
        with torch.no_grad():
            activations = result.output.activations
            error = (tokens - result.output.reconstruction).pow(2).sum()
            variance = (tokens - tokens.mean(0)).pow(2).sum()
        return {
            "loss": result.total,
            "explained_variance": 1 - error / variance,
            "l0": (activations > stage.threshold).float().sum(-1).mean(),
            "dead": (activations > stage.threshold).any(0).logical_not().float().mean(),
        }

    loop.run(losses)
    sae.fold_input_scale(scale)
    return sae


@torch.no_grad()
def collect_states(
    policy: Policy, samples: list[Sample], batch: int = 32
) -> Float[Tensor, "tokens D"]:
    """SAE-layer states of every token the SAE reads, for prompts with the oracle's answers."""
    visuals = visual_memo(policy.backbone)
    kept = []
    for start in range(0, len(samples), batch):
        pictures, sequences = encode_answers(policy, samples[start : start + batch], visuals)
        states, _ = policy(sequences, pictures)
        kept.append(states.sae_states[read_by_sae(states)].float())
    return torch.cat(kept)
