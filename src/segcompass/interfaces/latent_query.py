"""LISA-like: a token's state becomes a prompt of the mask decoder itself. Nothing to look at."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.grounding.slot_mapper import QueryConfidence
from segcompass.interfaces.base import Alignment, Interface, InterfaceConfig, Material
from segcompass.interfaces.registry import register
from segcompass.types import ReasoningBatch, given


class LatentQueryConfig(InterfaceConfig, frozen=True):
    """Sizes of what stands between the token and the decoder."""

    confidence_width: int = Field(32, ge=1, description="hidden channels of the confidence head")


@register
class LatentQuery(Interface):
    """The token's last-layer state, through Linear, ReLU, Linear, is a sparse prompt.

    Source: LISA. The confidence head is ours: without it, no answer could say "nothing matches".
    """

    name = "latent_query"
    Config = LatentQueryConfig
    decoder: MaskDecoder

    def __init__(self, config: LatentQueryConfig, decoder: MaskDecoder, policy_width: int) -> None:
        super().__init__()
        self.decoder, self.query_width = decoder, decoder.channels
        self.widen = nn.Linear(policy_width, policy_width)
        self.narrow = nn.Linear(policy_width, decoder.channels)
        self.confidence = QueryConfidence(decoder.channels, config.confidence_width)

    @classmethod
    def build(cls, config: LatentQueryConfig, material: Material) -> LatentQuery:
        """Make one of the configured sizes."""
        return cls(config, material.decoder, material.policy_width)

    @property
    def head(self) -> nn.ModuleDict:
        """The projection and the confidence head."""
        return nn.ModuleDict(
            {"widen": self.widen, "narrow": self.narrow, "confidence": self.confidence}
        )

    def align(self, states: ReasoningBatch, keys: Float[Tensor, "B C h w"], **_: Any) -> Alignment:
        """From the states at the concentration tokens to embedded prompts."""
        tokens = states.concentration_states.to(self.widen.weight.dtype)
        queries = self.narrow(self.widen(tokens).relu())
        return Alignment(self.confidence(queries), queries=queries)

    def decode(
        self,
        keys: Float[Tensor, "B C h w"],
        alignment: Alignment,
        *,
        select: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> Float[Tensor, "*slots 4h 4w"]:
        """Each query prompts the mask decoder, where a point or a box would."""
        queries = given(alignment.queries, "queries")
        return self.decoder.decode_queries(keys, queries, select=select)
