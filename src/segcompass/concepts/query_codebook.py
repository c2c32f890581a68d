"""From sparse codes to K concept vectors: the query codebook and its transformer encoder.

This is the left half of Fig. 3. The sum over concepts, y_t = Σ_j h_tj C_j, is read as an
embedding bag straight from the triplets, so cost and memory follow the number of active concepts
and not the size of the dictionary. It has no bias and is therefore exactly additive in concepts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from segcompass.concepts.sparse_codes import offsets
from segcompass.types import SparseCodes


class QueryCodebookConfig(BaseModel, frozen=True, extra="forbid"):
    """Sizes of the query codebook."""

    d_sae: int = Field(ge=1, description="SAE latents S, one codebook row each")
    width: int = Field(default=512, ge=1, description="codebook width C")
    slots: int = Field(default=6, ge=1, description="slots K, one concept vector each")
    layers: int = Field(default=2, ge=1, description="transformer encoder layers")
    heads: int = Field(default=8, ge=1, description="attention heads; divides width")
    ffn: int = Field(default=2048, ge=1, description="hidden width of the feed-forward part")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> QueryCodebookConfig:
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} cannot be divided among {self.heads} heads; "
                "choose a width that is a multiple of heads"
            )
        return self


class ConceptVectors(NamedTuple):
    """What the codebook hands to the slot queries."""

    vectors: Float[Tensor, "B K C"]
    slot_attention: Float[Tensor, "B K L"] | None  # last layer, mean over heads; if asked for


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and feed-forward, each added to the stream.

    Only the first ``queries`` positions are updated and returned: the last layer of the codebook
    needs its K slots alone, which spares it the work for thousands of tokens.
    """

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)
        self.to_out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, ffn)
        self.ffn_out = nn.Linear(ffn, width)

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        readable: Bool[Tensor, "B N"],
        *,
        queries: int,
        need_attention: bool = False,
    ) -> tuple[Float[Tensor, "B M C"], Float[Tensor, "B M N"] | None]:
        """Update the first M = ``queries`` positions from all readable ones."""
        normed = self.attention_norm(x)
        q = self._split(self.to_q(normed[:, :queries]))  # (B, H, M, dh)
        k, v = (self._split(part) for part in self.to_kv(normed).chunk(2, dim=-1))
        mask = readable[:, None, None, :]  # (B, 1, 1, N)
        probabilities: Tensor | None = None
        if need_attention:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            probabilities = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
            mixed = probabilities @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        stream = x[:, :queries] + self.to_out(mixed.transpose(1, 2).flatten(-2))
        stream = stream + self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(stream))))
        return stream, None if probabilities is None else probabilities.mean(dim=1)

    def _split(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B H N dh"]:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class QueryCodebook(nn.Module):
    """Select and aggregate the active concepts of a sequence into K concept vectors.

    Source: Sec. 3.2, Fig. 3; sizes as in the public release (S -> C without bias, pre-norm encoder
    with GELU, K learned slots prepended, final LayerNorm). There are no positions: the slots read
    a set of tokens.
    """

    def __init__(self, config: QueryCodebookConfig) -> None:
        super().__init__()
        self.config = config
        # A token sums some tens of rows times activations of a few units: 0.02 keeps y near 1.
        self.codebook = nn.Parameter(torch.empty(config.d_sae, config.width).normal_(std=0.02))
        # Unit spread keeps the slots apart from the first step, whatever the attention does.
        self.slots = nn.Parameter(torch.empty(config.slots, config.width).normal_())
        self.blocks = nn.ModuleList(
            EncoderBlock(config.width, config.heads, config.ffn) for _ in range(config.layers)
        )
        self.final_norm = nn.LayerNorm(config.width)

    def embed(self, codes: SparseCodes) -> Float[Tensor, "n C"]:
        """Sum each token's codebook rows, weighted by activation; zeros where nothing is active.

        Differentiable in ``codes.values`` and in the codebook.

        Raises:
            ValueError: the codes come from a dictionary of another size.
        """
        if codes.n_columns != self.config.d_sae:
            raise ValueError(
                f"the codes have {codes.n_columns} concepts, the codebook has "
                f"{self.config.d_sae} rows; use the sparse autoencoder it was trained with"
            )
        return F.embedding_bag(
            codes.columns,
            self.codebook,
            offsets(codes),
            mode="sum",
            per_sample_weights=codes.values.to(self.codebook.dtype),
        )

    def aggregate(
        self,
        tokens: Float[Tensor, "B L C"],
        valid: Bool[Tensor, "B L"],
        *,
        need_attention: bool = False,
    ) -> ConceptVectors:
        """Let K slots read the embedded tokens of each sequence.

        Args:
            tokens: what ``embed`` returned, laid out by sequence.
            valid: False at padding, which no position reads.
            need_attention: also return how much each slot reads from each token in the last layer
                (probabilities, mean over heads; a slot's row sums to 1 less its share for slots).
        """
        batch, slots = tokens.shape[0], self.config.slots
        tokens = tokens.masked_fill(~valid[..., None], 0.0)
        x = torch.cat([self.slots.expand(batch, -1, -1), tokens], dim=1)  # (B, K + L, C)
        readable = F.pad(valid, (slots, 0), value=True)
        attention: Tensor | None = None
        for depth, block in enumerate(self.blocks, start=1):
            last = depth == len(self.blocks)
            x, attention = block(
                x,
                readable,
                queries=slots if last else x.shape[1],
                need_attention=need_attention and last,
            )
        return ConceptVectors(
            vectors=self.final_norm(x),
            slot_attention=None if attention is None else attention[..., slots:],
        )

    def forward(
        self, codes: SparseCodes, valid: Bool[Tensor, "B L"], *, need_attention: bool = False
    ) -> ConceptVectors:
        """Turn the codes of a batch into K concept vectors per sequence.

        Args:
            codes: triplets of B·L rows; row b·L + l is token l of sequence b.
            valid: False at padding. A valid token without codes is read as a zero vector.
            need_attention: see ``aggregate``.

        Raises:
            ValueError: the codes do not have one row per token, or have the wrong concepts.
        """
        if codes.n_rows != valid.numel():
            raise ValueError(
                f"the codes have {codes.n_rows} rows, the batch has {tuple(valid.shape)} tokens; "
                "lay them out with spread_rows(codes, valid.flatten())"
            )
        tokens = self.embed(codes).view(*valid.shape, -1)
        return self.aggregate(tokens, valid, need_attention=need_attention)
