"""CoPRS: one concentration token, its heatmap, a mask. No concepts between language and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from segcompass.geometry import Frame
from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.grounding.slot_mapper import SlotMapper, SlotMapperConfig
from segcompass.interfaces.base import Alignment, InterfaceConfig, Material
from segcompass.interfaces.heatmaps import HeatmapInterface
from segcompass.interfaces.registry import register
from segcompass.types import ReasoningBatch


class ConcentrationTokenConfig(InterfaceConfig, frozen=True):
    """Sizes of what stands between the token and its heatmap."""

    mapper: SlotMapperConfig = Field(SlotMapperConfig(), description="see grounding/slot_mapper.py")


@register
class ConcentrationToken(HeatmapInterface):
    """The token's last-layer state is the query; its heatmap is a prior over positions.

    Source: CoPRS. The policy asks for ``prompt.slots: 1``; the one mask is the union of all
    targets. More slots work as well: each is then one target, as in SegCompass.
    """

    name = "concentration_token"
    Config = ConcentrationTokenConfig

    def __init__(
        self, config: ConcentrationTokenConfig, decoder: MaskDecoder, policy_width: int
    ) -> None:
        super().__init__()
        self.mapper = SlotMapper(
            config.mapper, query_width=policy_width, key_width=decoder.channels
        )
        self.decoder = decoder

    @classmethod
    def build(cls, config: ConcentrationTokenConfig, material: Material) -> ConcentrationToken:
        """Make one of the configured sizes."""
        return cls(config, material.decoder, material.policy_width)

    def align(
        self,
        states: ReasoningBatch,
        keys: Float[Tensor, "B C h w"],
        *,
        frames: Sequence[Frame],
        **_: Any,
    ) -> Alignment:
        """From the states at the concentration tokens straight to heatmaps."""
        queries = states.concentration_states.to(self.mapper.to_q.weight.dtype)
        return self.ground(queries, keys, frames)
