"""Latents of a sparse autoencoder in training: when each last fired, and what wakes the dead."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder
from segcompass.io.errors import CheckpointError
from segcompass.types import TokenKind

MODALITIES = ("text", "image")  # rows of every [2, S] count here


def modality_of(kinds: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """Row in :data:`MODALITIES` of each token."""
    return (kinds == TokenKind.IMAGE).long()


class LatentClock:
    """Tokens since each latent last fired: on text, on pictures, on either.

    Args:
        width: S.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.since = torch.zeros(3, width, dtype=torch.long, device=device)
        self.seen = 0

    def update(self, fired: Int[Tensor, "2 S"], tokens: Int[Tensor, "2"]) -> None:
        """Count a step: on how many tokens of each modality each latent fired, of how many."""
        rows = torch.cat([fired, fired.sum(0, keepdim=True)])
        passed = torch.cat([tokens, tokens.sum(0, keepdim=True)])
        self.since = torch.where(rows > 0, 0, self.since + passed[:, None])
        self.seen += int(tokens.sum())

    def dead(self, after: int) -> Bool[Tensor, "S"]:
        """Which fired on none of the last ``after`` tokens; nobody knows before so many."""
        return self.since[2] >= after

    def restart(self, latents: Int[Tensor, "m"]) -> None:
        """Give them ``after`` tokens of time again."""
        self.since[:, latents] = 0

    def save(self, path: Path) -> None:
        """Write the counts in one move."""
        partial = path.with_suffix(".partial")
        seen = torch.tensor(self.seen)
        save_file({"since": self.since.cpu().contiguous(), "seen": seen}, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Take up saved counts; raises CheckpointError if they are missing or another SAE's."""
        try:
            tensors = load_file(path)
            since, seen = tensors["since"], tensors["seen"]
        except Exception as error:  # a damaged file may raise anything; named here
            raise CheckpointError(
                f"{path} is missing or damaged ({error}); delete the stage's folder to start anew"
            ) from error
        if since.shape != self.since.shape:
            raise CheckpointError(
                f"{path} counts {since.shape[-1]} latents, the config has {self.since.shape[-1]}; "
                "resume with the config that wrote it"
            )
        self.since, self.seen = since.to(self.since.device), int(seen)


def push_up(
    sae: SparseAutoencoder, z: Float[Tensor, "n D"], dead: Bool[Tensor, "S"]
) -> Float[Tensor, ""]:
    """How far below zero dead latents lie, mean over tokens: a loss that reaches them.

    Source: the pre-activation loss of Anthropic's "Circuits updates, January 2025", for ReLU; the
    ordinary gradient of a latent that never fires is zero.
    """
    columns = dead.nonzero().squeeze(-1)
    centred = z - sae.b_dec.detach() if sae.config.apply_b_dec_to_input else z
    before = torch.addmm(sae.b_enc[columns], centred, sae.W_enc[:, columns])
    norms = sae.W_dec.detach()[columns].norm(dim=-1)
    depths: Tensor = (-before).relu() @ norms
    return depths.mean()


class Restart(NamedTuple):
    """New rows for some latents."""

    latents: Int[Tensor, "m"]
    decoder: Float[Tensor, "m D"]
    encoder: Float[Tensor, "m D"]


def new_latents(
    sae: SparseAutoencoder,
    z: Float[Tensor, "n D"],
    errors: Float[Tensor, "n"],
    dead: Bool[Tensor, "S"],
    *,
    decoder_norm: float,
    generator: torch.Generator,
) -> Restart:
    """Point dead latents at tokens that are reconstructed badly.

    Source: Bricken et al. 2023, "Towards monosemanticity", neuron resampling. Tokens are drawn by
    squared loss; the encoder row gets a fifth of the living ones' mean norm, the bias becomes 0.

    Args:
        errors: squared error of each token of ``z``.
        dead: which latents; at most n of them are restarted.
        decoder_norm: of the new decoder rows.
    """
    latents = dead.nonzero().squeeze(-1)[: len(z)]
    weights = errors.double().square().cpu() + 1e-30
    chosen = torch.multinomial(weights, len(latents), generator=generator).to(z.device)
    directions = torch.nn.functional.normalize(z[chosen] - sae.b_dec, dim=-1)
    living = sae.W_enc[:, ~dead].norm(dim=0)
    size = 0.2 * living.mean() if len(living) else decoder_norm
    return Restart(latents, directions * decoder_norm, directions * size)
