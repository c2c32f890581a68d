"""What the interfaces with heatmaps share: slot queries meet image keys, heatmaps prompt masks."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from segcompass.geometry import Frame, padding_mask
from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.grounding.slot_mapper import SlotMapper
from segcompass.interfaces.base import Alignment, Interface
from segcompass.types import given


class HeatmapInterface(Interface):
    """Slot mapper and mask decoder behind queries of any making."""

    mapper: SlotMapper
    decoder: MaskDecoder

    @property
    def head(self) -> nn.ModuleDict:
        """The slot mapper."""
        return nn.ModuleDict({"mapper": self.mapper})

    def ground(
        self,
        queries: Float[Tensor, "B K Q"],
        keys: Float[Tensor, "B C h w"],
        frames: Sequence[Frame],
    ) -> Alignment:
        """Eq. 5, with the cells that show no image left out of the confidences."""
        padding = padding_mask(frames, keys.shape[-1], keys.device)
        slots = self.mapper(queries, keys, padding)
        return Alignment(slots.confidence_logits, slots, queries)

    def decode(
        self,
        keys: Float[Tensor, "B C h w"],
        alignment: Alignment,
        *,
        frames: Sequence[Frame],
        select: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "*slots 4h 4w"]:
        """Eq. 3: heatmaps prompt the mask decoder."""
        maps = given(alignment.slots, "heatmaps").heatmap_logits
        return self.decoder(keys, maps, frames=frames, select=select)  # type: ignore[no-any-return]
