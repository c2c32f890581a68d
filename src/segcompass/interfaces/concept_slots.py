"""SegCompass itself: sparse concepts and concentration tokens become slot queries (Fig. 2 and 3).

    states -> SAE codes -> query codebook -> r_k   \\
    concentration tokens -> e_k                     -> fusion -> slot mapper -> mask decoder
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from segcompass.concepts.query_codebook import QueryCodebook, QueryCodebookConfig
from segcompass.concepts.sparse_autoencoder import SparseAutoencoder
from segcompass.concepts.sparse_codes import spread_rows
from segcompass.geometry import Frame
from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.grounding.slot_mapper import SlotMapper, SlotMapperConfig
from segcompass.interfaces.base import Alignment, Interface, InterfaceConfig, Material
from segcompass.interfaces.heatmaps import HeatmapInterface
from segcompass.interfaces.registry import register
from segcompass.types import ReasoningBatch, SparseCodes, TokenKind

READ_BY_SAE = (TokenKind.TEMPLATE, TokenKind.IMAGE, TokenKind.INSTRUCTION, TokenKind.THOUGHT)


def read_by_sae(states: ReasoningBatch) -> Bool[Tensor, "B L"]:
    """Which tokens the SAE reads: prompt and thought, never padding or concentration tokens."""
    return torch.stack([states.token_kinds == kind for kind in READ_BY_SAE]).any(0)


class HeadConfig(InterfaceConfig, frozen=True):
    """Sizes of everything between the policy's states and the slots."""

    codebook_width: int = Field(128, ge=1, description="C")
    codebook_layers: int = Field(2, ge=1)
    codebook_heads: int = Field(8, ge=1)
    codebook_ffn: int = Field(256, ge=1)
    mapper: SlotMapperConfig = SlotMapperConfig()


class Fusion(nn.Module):
    """Slot queries from concentration tokens and concept vectors.

    Source: Eq. 2, Q_k = MLP(Concat(e_k, r_k)); layers as in the public release: project r to the
    policy's width, concatenate, LayerNorm, Linear, SiLU.
    """

    def __init__(self, policy_width: int, codebook_width: int) -> None:
        super().__init__()
        self.project = nn.Linear(codebook_width, policy_width)
        self.norm = nn.LayerNorm(2 * policy_width)
        self.mix = nn.Linear(2 * policy_width, policy_width)

    def forward(
        self,
        tokens: Float[Tensor, "B K D"],
        concepts: Float[Tensor, "B K C"],
        gates: Float[Tensor, "#B 2"] | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Fuse both into queries of the policy's width.

        ``gates`` scale the two paths, tokens first: 0 cuts a path off.
        """
        told = self.project(concepts)
        if gates is not None:
            tokens, told = tokens * gates[:, :1, None], told * gates[:, 1:, None]
        joined = torch.cat([tokens, told], dim=-1)
        return nn.functional.silu(self.mix(self.norm(joined)))


@register
class ConceptSlots(HeatmapInterface):
    """The SegCompass interface.

    Args:
        config: Sizes.
        sae: Frozen sparse autoencoder on the policy's states.
        decoder: Mask-prompt path and two-way decoder of the segmenter.
        policy_width: D.
        slots: K.
    """

    name = "concept_slots"
    Config = HeadConfig
    has_concepts = True
    sae: SparseAutoencoder

    def __init__(
        self,
        config: HeadConfig,
        sae: SparseAutoencoder,
        decoder: MaskDecoder,
        *,
        policy_width: int,
        slots: int,
    ) -> None:
        if sae.config.d_in != policy_width:
            raise ValueError(
                f"the SAE reads states of width {sae.config.d_in}, the policy has {policy_width}; "
                "use an SAE that was trained on this policy"
            )
        super().__init__()
        self.config = config
        self.sae = sae.requires_grad_(False)
        self.codebook = QueryCodebook(
            QueryCodebookConfig(
                d_sae=sae.config.d_sae,
                width=config.codebook_width,
                slots=slots,
                layers=config.codebook_layers,
                heads=config.codebook_heads,
                ffn=config.codebook_ffn,
            )
        )
        self.fusion = Fusion(policy_width, config.codebook_width)
        self.mapper = SlotMapper(
            config.mapper, query_width=policy_width, key_width=decoder.channels
        )
        self.decoder = decoder

    @classmethod
    def build(cls, config: HeadConfig, material: Material) -> ConceptSlots:
        """Make one of the configured sizes; raises ValueError if the SAE does not fit."""
        if material.sae is None:
            raise ValueError("concept_slots reads a sparse autoencoder; train one (train sae)")
        width, slots = material.policy_width, material.slots
        return cls(config, material.sae, material.decoder, policy_width=width, slots=slots)

    @property
    def head(self) -> nn.ModuleDict:
        """Codebook, fusion and slot mapper."""
        return nn.ModuleDict(
            {"codebook": self.codebook, "fusion": self.fusion, "mapper": self.mapper}
        )

    def trained(self) -> dict[str, nn.Module]:
        """The codebook has a rate of its own."""
        return {
            "codebook": self.codebook,
            "head": nn.ModuleList([self.fusion, self.mapper]),
            "decoder": self.decoder,
        }

    def align(
        self,
        states: ReasoningBatch,
        keys: Float[Tensor, "B C h w"],
        *,
        frames: Sequence[Frame],
        need_attention: bool = False,
        gates: Float[Tensor, "#B 2"] | None = None,
        **_: Any,
    ) -> Alignment:
        """Eq. 4, Fig. 3, Eq. 2 and Eq. 5 in this order; arguments as of the base class.

        The SAE reads prompt and thought, never padding. With ``need_attention`` the result also
        tells which tokens each slot reads, and how far the SAE's copy of each token is off.
        """
        readable = read_by_sae(states)
        z = states.sae_states[readable].to(self.fusion.mix.weight.dtype)
        codes = self.sae.encode_sparse(z)
        alignment = self.align_codes(
            spread_rows(codes, readable.flatten()),
            readable,
            states.concentration_states,
            keys,
            frames=frames,
            need_attention=need_attention,
            gates=gates,
        )
        if not need_attention:
            return alignment
        errors = z.new_full(readable.shape, torch.nan)
        errors[readable] = (z - self.sae.decode_sparse(codes)).square().mean(-1)
        return alignment._replace(sae_errors=errors)

    def align_codes(
        self,
        codes: SparseCodes,
        readable: Bool[Tensor, "B L"],
        tokens: Float[Tensor, "B K D"],
        keys: Float[Tensor, "B C h w"],
        *,
        frames: Sequence[Frame],
        need_attention: bool = False,
        gates: Float[Tensor, "#B 2"] | None = None,
    ) -> Alignment:
        """Fig. 3, Eq. 2 and Eq. 5 alone: :meth:`align` from codes that are there already.

        Args:
            codes: of B·L rows; row b·L + l is token l of sequence b.
            readable: which tokens the SAE read (:func:`read_by_sae`).
            tokens: states at the concentration tokens.
            keys: as for :meth:`align`, and so the rest.
        """
        concepts = self.codebook(codes, readable, need_attention=need_attention)
        queries = self.fusion(tokens.to(self.fusion.mix.weight.dtype), concepts.vectors, gates)
        return self.ground(queries, keys, frames)._replace(
            concept_vectors=concepts.vectors, codes=codes, slot_attention=concepts.slot_attention
        )


def with_concepts(interface: Interface) -> ConceptSlots:
    """The interface, if it has concepts to explain.

    Raises:
        ValueError: if it has none, or others than its own decide about its answers.
    """
    if isinstance(interface, ConceptSlots):
        return interface
    if interface.sae is not None:
        raise ValueError(
            f"a model of the interface {interface.name} chooses among candidates, which its source "
            "model's concepts do not explain; explain that one, of the interface concept_slots"
        )
    raise ValueError(
        f"a model of the interface {interface.name} has no concepts to look at or to change; "
        "take one of the interface concept_slots"
    )
