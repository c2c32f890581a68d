"""From slot queries and image keys to heatmaps and confidences (Eq. 5)."""

from __future__ import annotations

from typing import Literal, cast

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, Field
from torch import Tensor, nn

from segcompass.types import Slots

MAP_BIAS = -1.8  # at the start a heatmap covers sigmoid(-1.8), about 14 % of the image


class SlotMapperConfig(BaseModel, frozen=True, extra="forbid"):
    """Sizes of the slot mapper."""

    heads: int = Field(4, ge=1, description="attention heads H (Eq. 5)")
    head_width: int = Field(64, ge=1, description="channels of one head")
    position_frequencies: int = Field(
        8, ge=0, description="waves a side that tell the keys where they are; 0 as in the paper"
    )
    confidence: Literal["scores", "query"] = Field(
        "scores", description="what the confidence head reads: head scores (Eq. 5) or slot queries"
    )
    confidence_width: int = Field(32, ge=1, description="hidden channels of the confidence head")


class ScoreConfidence(nn.Module):
    """Judge a slot by its score maps: mix the heads at each position, then pool over positions.

    Mixing before pooling lets the head see that several heads agree *at one place*.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Conv2d(heads, width, 1), nn.SiLU())
        self.read = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(
        self, scores: Float[Tensor, "B K H h w"], padding: Bool[Tensor, "B h w"] | None
    ) -> Float[Tensor, "B K"]:
        """Confidence logits; positions in the padding are left out."""
        batch, slots = scores.shape[:2]
        mixed = self.mix(scores.flatten(0, 1)).flatten(2).unflatten(0, (batch, slots))
        if padding is None:
            largest, mean = mixed.amax(-1), mixed.mean(-1)
        else:
            outside = padding.flatten(1)[:, None, None]  # (B, 1, 1, h*w)
            largest = mixed.masked_fill(outside, -torch.inf).amax(-1)
            inside = (~outside).to(mixed.dtype)
            mean = (mixed * inside).sum(-1) / inside.sum(-1)
        logits: Tensor = self.read(torch.cat([largest, mean], dim=-1))
        return logits.squeeze(-1)


class QueryConfidence(nn.Module):
    """Judge a slot by its query alone (the public release's variant)."""

    def __init__(self, query_width: int, width: int) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(query_width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, queries: Float[Tensor, "B K Q"]) -> Float[Tensor, "B K"]:
        """Confidence logits."""
        logits: Tensor = self.read(queries)
        return logits.squeeze(-1)


def axis_waves(height: int, width: int, frequencies: int) -> Float[Tensor, "P h w"]:
    """Sines and cosines of each axis: what a grid position is, as ``4 * frequencies`` channels.

    Frequency n makes n half-turns over the side; positions are cell centres in (0, 1).
    """
    turns = torch.pi * torch.arange(1, frequencies + 1)
    y = turns[:, None] * ((torch.arange(height) + 0.5) / height)
    x = turns[:, None] * ((torch.arange(width) + 0.5) / width)
    rows = torch.cat([y.sin(), y.cos()])[:, :, None].expand(-1, -1, width)
    columns = torch.cat([x.sin(), x.cos()])[:, None, :].expand(-1, height, -1)
    return torch.cat([rows, columns])


class SlotMapper(nn.Module):
    """Attend from K slot queries to the image keys and read off heatmaps and confidences.

    Source: Eq. 5. Scores are raw scaled dot products; there is no softmax over positions. The
    map head works at the resolution of the keys.
    """

    def __init__(self, config: SlotMapperConfig, *, query_width: int, key_width: int) -> None:
        """Build the mapper.

        Args:
            config: sizes.
            query_width: channels Q of a slot query.
            key_width: channels of the image keys.
        """
        super().__init__()
        self.config, self.query_width, self.key_width = config, query_width, key_width
        heads, inner = config.heads, config.heads * config.head_width
        self.to_q = nn.Linear(query_width, inner, bias=False)
        # "at b4" in a thought is a row and a column: keys that say both can be matched linearly.
        placed_width = key_width + 4 * config.position_frequencies
        self.to_k = nn.Conv2d(placed_width, inner, 1, bias=False)
        self.scale = config.head_width**-0.5
        last = nn.Conv2d(heads, 1, 3, padding=1)
        nn.init.constant_(cast(Tensor, last.bias), MAP_BIAS)
        self.map_head = nn.Sequential(nn.Conv2d(heads, heads, 3, padding=1), nn.SiLU(), last)
        self.confidence_head: ScoreConfidence | QueryConfidence
        if config.confidence == "scores":
            self.confidence_head = ScoreConfidence(heads, config.confidence_width)
        else:
            self.confidence_head = QueryConfidence(query_width, config.confidence_width)

    def forward(
        self,
        queries: Float[Tensor, "B K Q"],
        keys: Float[Tensor, "B C h w"],
        padding: Bool[Tensor, "B h w"] | None = None,
    ) -> Slots:
        """Map slot queries onto the image.

        Args:
            queries: slot queries (Eq. 2).
            keys: image keys.
            padding: positions that show no image (``geometry.padding_mask``); the confidence
                head leaves them out. The scores and heatmaps keep them, as computed.

        Raises:
            ValueError: When widths or batch sizes disagree.
        """
        self._check(queries, keys)
        heads = self.config.heads
        q = self.to_q(queries).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, K, dh)
        waves = axis_waves(keys.shape[-2], keys.shape[-1], self.config.position_frequencies)
        waves = waves.to(keys).expand(len(keys), -1, -1, -1)
        k = (
            self.to_k(torch.cat([keys, waves], dim=1)).flatten(2).unflatten(1, (heads, -1))
        )  # (B, H, dh, h*w)
        scores = ((q * self.scale) @ k).transpose(1, 2).unflatten(-1, keys.shape[-2:])
        heatmaps = self.map_head(scores.flatten(0, 1)).squeeze(1)  # (B*K, h, w)
        if isinstance(self.confidence_head, ScoreConfidence):
            confidence = self.confidence_head(scores, padding)
        else:
            confidence = self.confidence_head(queries)
        return Slots(
            scores=scores,
            heatmap_logits=heatmaps.unflatten(0, queries.shape[:2]),
            confidence_logits=confidence,
        )

    def _check(self, queries: Tensor, keys: Tensor) -> None:
        if queries.ndim != 3 or queries.shape[-1] != self.query_width:
            raise ValueError(
                f"expected queries (B, K, {self.query_width}), got {tuple(queries.shape)}"
            )
        if keys.ndim != 4 or keys.shape[1] != self.key_width:
            raise ValueError(
                f"expected image keys (B, {self.key_width}, h, w), got {tuple(keys.shape)}"
            )
        if queries.shape[0] != keys.shape[0]:
            raise ValueError(
                f"queries are of {queries.shape[0]} images, keys of {keys.shape[0]}; "
                "repeat the keys or index them so that row b of both is the same image"
            )
