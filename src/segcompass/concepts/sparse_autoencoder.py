"""The sparse autoencoder: hidden states of the policy to sparse, nameable concepts and back.

Two ways to encode. ``encode`` returns the dense [n, S] activations, for training on small batches
and for tests. ``encode_sparse`` is what inference and joint training use: it works through the
dictionary in chunks and keeps only (token, concept, activation), so no [n, S] tensor exists.
Files are in the layout of SAELens (``cfg.json`` + ``sae_weights.safetensors``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from segcompass.concepts.sae_files import CONFIG_NAME, SaeFiles, read_sae_files, write_sae_files
from segcompass.concepts.sparse_codes import offsets
from segcompass.types import SparseCodes

DEFAULT_CHUNK = 2048  # latents at a time; larger pays on accelerators, smaller saves memory
_BUFFER_ELEMENTS = 1 << 22  # rows × chunk that are alive at once, unless a chunk alone is larger
_MIN_ROWS = 1024  # fewer rows per product would be bound by reading W_enc


class SparseAutoencoderConfig(BaseModel, frozen=True, extra="forbid"):
    """Sizes and conventions of a sparse autoencoder."""

    d_in: int = Field(ge=1, description="width D of the hidden states")
    d_sae: int = Field(ge=1, description="latents S in the dictionary")
    threshold: float = Field(
        default=0.0, ge=0.0, allow_inf_nan=False, description="codes keep activations above this"
    )
    apply_b_dec_to_input: bool = Field(
        default=False, description="subtract b_dec from the input before encoding"
    )


class SaeOutput(NamedTuple):
    """What one pass through the autoencoder gives."""

    reconstruction: Float[Tensor, "... D"]
    activations: Float[Tensor, "... S"]  # after the ReLU, before any threshold


class SaeLoss(NamedTuple):
    """Eq. 7 and its parts, means over tokens."""

    total: Float[Tensor, ""]  # reconstruction + l1 · sparsity
    reconstruction: Float[Tensor, ""]  # squared error summed over D
    sparsity: Float[Tensor, ""]  # L1 norm of the activations, before the coefficient
    output: SaeOutput


class _EncodeSparse(torch.autograd.Function):
    """Entries of relu(z W + b) above a threshold, and their gradient in z.

    The backward pass reads only the columns of active entries, as an embedding bag over W
    transposed: no [n, S] gradient and no gathered [nnz, D] copy. W and b are constants here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor,  # (S, D)
        bias: Tensor,
        threshold: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        step = max(_MIN_ROWS, _BUFFER_ELEMENTS // chunk)
        blocks = [
            _encode_rows(part, weight, bias, threshold, chunk) for part in torch.split(z, step)
        ]
        rows = torch.cat([block[0] + i * step for i, block in enumerate(blocks)])
        columns = torch.cat([block[1] for block in blocks])
        values = torch.cat([block[2] for block in blocks])
        ctx.save_for_backward(rows, columns, weight)
        ctx.n_rows = z.shape[0]
        ctx.mark_non_differentiable(rows, columns)
        return rows, columns, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        rows, columns, weight = ctx.saved_tensors
        every_row = torch.arange(ctx.n_rows, device=rows.device)
        grad_z = F.embedding_bag(
            columns,
            weight,
            torch.searchsorted(rows, every_row),
            mode="sum",
            per_sample_weights=grads[2],
        )
        return grad_z, None, None, None, None


def _encode_rows(
    z: Float[Tensor, "n D"],
    weight: Float[Tensor, "S D"],
    bias: Tensor,
    threshold: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode some rows chunk by chunk; the triplets come back in (row, column) order."""
    n, width = z.shape[0], weight.shape[0]
    buffer = z.new_empty(n * min(chunk, width))
    rows, columns, values = [], [], []
    for start in range(0, width, chunk):
        part = weight[start : start + chunk]
        size = part.shape[0]
        flat = buffer[: n * size]
        torch.addmm(bias[start : start + size], z, part.t(), out=flat.view(n, size))
        kept = (flat > threshold).nonzero().squeeze(-1)  # threshold >= 0, so the ReLU is implied
        rows.append(kept.div(size, rounding_mode="floor"))
        columns.append(kept.remainder(size) + start)
        values.append(flat[kept])
    all_rows, order = torch.sort(torch.cat(rows), stable=True)
    return all_rows, torch.cat(columns)[order], torch.cat(values)[order]


class SparseAutoencoder(nn.Module):
    """ReLU autoencoder with one hidden layer of S latents, of which few are active.

    Source: Sec. 3.2, Eq. 7. Names and shapes are those of SAELens. ``W_enc`` has shape [D, S] but
    lies in memory by latent (its transpose is contiguous): chunks of the dictionary and single
    latents are then contiguous rows, which measures faster in both directions. A saved or exported
    ``W_enc`` is made contiguous again.
    """

    def __init__(
        self, config: SparseAutoencoderConfig, mean: Float[Tensor, "D"] | None = None
    ) -> None:
        """Start with decoder rows of norm 0.1, W_enc = W_decᵀ and b_dec = ``mean`` (default 0)."""
        super().__init__()
        self.config = config
        self.metadata: dict[str, Any] = {}  # of the files it was loaded from
        decoder = F.normalize(torch.randn(config.d_sae, config.d_in), dim=-1) * 0.1
        self.W_dec = nn.Parameter(decoder)
        self.W_enc = nn.Parameter(decoder.clone().t())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        if mean is not None:
            self._check_width(mean)
            with torch.no_grad():
                self.b_dec.copy_(mean)

    def encode(self, z: Float[Tensor, "... D"]) -> Float[Tensor, "... S"]:
        """Return the dense activations relu(z W_enc + b_enc); the threshold is not applied."""
        self._check_width(z)
        return F.relu(F.linear(self._centred(z), self.W_enc.t(), self.b_enc))

    def decode(self, activations: Float[Tensor, "... S"]) -> Float[Tensor, "... D"]:
        """Return the hidden states that the activations stand for."""
        return activations @ self.W_dec + self.b_dec

    def forward(self, z: Float[Tensor, "... D"]) -> SaeOutput:
        """Encode and decode; the dense way, for training and for measuring fidelity."""
        activations = self.encode(z)
        return SaeOutput(self.decode(activations), activations)

    def encode_sparse(self, z: Float[Tensor, "n D"], *, chunk: int = DEFAULT_CHUNK) -> SparseCodes:
        """Encode to triplets without ever holding n × S activations.

        Source: Eq. 4; an entry is kept when its activation exceeds ``config.threshold``.
        Differentiable in ``z`` through the active entries; the SAE itself counts as frozen.

        Args:
            z: hidden states of n tokens, without padding.
            chunk: latents of the dictionary per product, >= 1. Results do not depend on it beyond
                float order; transient memory does.

        Returns:
            Codes with n rows, ordered by token and then concept, values in the SAE's dtype.

        Raises:
            ValueError: ``z`` is not [n, D], or ``chunk`` is not positive.
        """
        self._check_width(z)
        if z.ndim != 2 or chunk < 1:
            raise ValueError(
                f"expected states [n, {self.config.d_in}] and a positive chunk, got "
                f"{tuple(z.shape)} and {chunk}; flatten batch and tokens first"
            )
        rows, columns, values = _EncodeSparse.apply(  # type: ignore[no-untyped-call]
            self._centred(z.to(self.W_enc.dtype)),
            self.W_enc.detach().t(),
            self.b_enc.detach(),
            self.config.threshold,
            chunk,
        )
        return SparseCodes(rows, columns, values, z.shape[0], self.config.d_sae)

    def decode_sparse(self, codes: SparseCodes) -> Float[Tensor, "n D"]:
        """Return the hidden states that triplets stand for, reading only the active latents."""
        return F.embedding_bag(
            codes.columns,
            self.W_dec.to(codes.values.dtype),
            offsets(codes),
            mode="sum",
            per_sample_weights=codes.values,
        ) + self.b_dec.to(codes.values.dtype)

    def loss(
        self, z: Float[Tensor, "n D"], l1: float | Tensor, *, weigh_by_decoder: bool = False
    ) -> SaeLoss:
        """Squared reconstruction error plus L1 on the activations, means over tokens.

        Source: Eq. 7. The paper leaves the scale of the decoder open, where a penalty could be
        escaped by growing it: weigh each activation by its decoder norm, or keep unit norms.

        Args:
            z: hidden states of real tokens, in the scale the SAE is trained in.
            l1: coefficient α of Eq. 7, >= 0.
            weigh_by_decoder: multiply each activation by the norm of its decoder row.
        """
        output = self(z)
        reconstruction = (z - output.reconstruction).square().sum(-1).mean()
        if weigh_by_decoder:
            sparsity = (output.activations @ self.W_dec.norm(dim=-1)).mean()
        else:
            sparsity = output.activations.sum(-1).mean()  # never negative
        return SaeLoss(reconstruction + l1 * sparsity, reconstruction, sparsity, output)

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """Make an SAE that was trained on ``scale * z`` work on ``z`` itself, in place."""
        self.W_enc.mul_(scale)
        self.W_dec.div_(scale)
        self.b_dec.div_(scale)

    @torch.no_grad()
    def fold_decoder_norms(self) -> None:
        """Move each decoder row's norm into its activation, in place; outputs stay the same.

        Afterwards an activation says how far its concept moves the state, so one threshold
        means the same for all of them.
        """
        norms = self.W_dec.norm(dim=-1).clamp_min(torch.finfo(self.W_dec.dtype).tiny)
        self.W_dec.div_(norms[:, None])
        self.W_enc.mul_(norms)
        self.b_enc.mul_(norms)

    def save(self, folder: Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the SAELens layout; other tools can open the folder.

        Args:
            folder: created if missing; its two files are replaced.
            metadata: JSON values to store (model_name, hook_name, …); by default those the SAE
                was loaded with. Our threshold and the layout's version are added.
        """
        extra = dict(self.metadata if metadata is None else metadata)
        write_sae_files(
            folder,
            SaeFiles(
                self.config.d_in,
                self.config.d_sae,
                self.config.apply_b_dec_to_input,
                {**extra, "threshold": self.config.threshold},
                dict(self.state_dict()),
            ),
        )

    @classmethod
    def load(cls, folder: Path) -> SparseAutoencoder:
        """Read a folder in the SAELens layout onto the CPU, in the dtype it is stored in.

        Folders from other tools carry no threshold: theirs is 0.

        Raises:
            ValueError: a file is missing, damaged, of another architecture, or does not fit the
                sizes in ``cfg.json``.
        """
        files = read_sae_files(folder)
        try:
            config = SparseAutoencoderConfig(
                d_in=files.d_in,
                d_sae=files.d_sae,
                threshold=files.metadata.get("threshold", 0.0),
                apply_b_dec_to_input=files.apply_b_dec_to_input,
            )
        except ValidationError as error:
            raise ValueError(f"{folder / CONFIG_NAME}: metadata cannot be used: {error}") from error
        with torch.device("meta"):  # spares the random start, which takes seconds at full size
            sae = cls(config)
        sae.to(dtype=files.weights["W_enc"].dtype).to_empty(device="cpu")
        sae.load_state_dict(files.weights)
        sae.metadata = files.metadata
        return sae

    def _centred(self, z: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return z - self.b_dec if self.config.apply_b_dec_to_input else z

    def _check_width(self, z: Tensor) -> None:
        if z.shape[-1:] != (self.config.d_in,):
            raise ValueError(
                f"expected states of width {self.config.d_in}, got shape {tuple(z.shape)}; "
                "the SAE reads the layer it was trained on"
            )
