"""The protocol that every way of aligning language with pixels fills in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from jaxtyping import Bool, Float
from torch import Tensor

from segcompass.geometry import Frame
from segcompass.types import ReasoningBatch, Slots, SparseCodes


class Alignment(NamedTuple):
    """From reasoning to slots, with everything in between."""

    slots: Slots
    queries: Float[Tensor, "B K Q"]  # Eq. 2
    concept_vectors: Float[Tensor, "B K C"]  # Fig. 3
    codes: SparseCodes  # row b*L + l is token l of sequence b
    slot_attention: Float[Tensor, "B K L"] | None  # which tokens each slot reads
    sae_errors: Float[Tensor, "B L"] | None = None  # ‖z - ẑ‖² / D; NaN for tokens not read


# What the paths from language to queries are scaled with: (concentration tokens, concepts).
PATHS: dict[str, tuple[float, float]] = {"both": (1, 1), "tokens": (1, 0), "concepts": (0, 1)}


class Interface(Protocol):
    """A way of aligning: states of the reasoning and image keys in, slots and masks out."""

    def align(
        self,
        states: ReasoningBatch,
        keys: Float[Tensor, "B C h w"],
        *,
        padding: Bool[Tensor, "B h w"] | None = None,
        need_attention: bool = False,
        gates: Float[Tensor, "#B 2"] | None = None,
    ) -> Alignment:
        """From the policy's states to heatmaps and confidences."""

    def decode(
        self,
        keys: Float[Tensor, "B C h w"],
        slots: Slots,
        *,
        frames: Sequence[Frame] | None = None,
        select: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "*slots 4h 4w"]:
        """Mask logits over the square frame, of all slots or of ``select``."""
