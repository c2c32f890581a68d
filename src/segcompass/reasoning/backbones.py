"""Multimodal language models behind one small protocol: where their layers, images and tokens are.

Real Hugging Face models only: `Qwen2_5_VLForConditionalGeneration` and
`LlavaForConditionalGeneration`. A new family is one class with the members of `Backbone`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from transformers import (
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from segcompass.geometry import Fit, pad_to_square, shrink, stretch, token_boxes

_MAX_SQUARE = 4096  # px; a long thin picture on its square must not exhaust the memory
_MAX_STRETCH = 200  # Qwen2.5-VL's processor refuses pictures longer than this times their width


class VisualInput(NamedTuple):
    """One image, ready for the policy."""

    pixels: Float[Tensor, "..."]  # what the vision tower takes; family-specific layout
    grid: tuple[int, int]  # rows, columns of image tokens
    boxes: Float[np.ndarray, "n 4"]  # x0 y0 x1 y1 of every image token, in px of the image


class Backbone(Protocol):
    """What the policy needs to know of a model family."""

    model: PreTrainedModel
    image_processor: Any
    pad_square: bool
    stretch_to: int | None

    @property
    def layers(self) -> nn.ModuleList: ...

    @property
    def final_norm(self) -> nn.Module: ...

    @property
    def vision(self) -> nn.Module:
        """Everything that turns pixels into image features."""

    @property
    def image_token_id(self) -> int: ...

    @property
    def placeholder_ids(self) -> list[int]:
        """Tokens that stand for pictures or videos; an answer must not hold any."""

    def prepare(self, image: np.ndarray) -> VisualInput:
        """Resize, normalise and cut up an RGB image (uint8, height × width × 3)."""

    def image_arguments(self, visuals: list[VisualInput]) -> dict[str, Tensor]:
        """Arguments of ``forward``/``generate`` that carry the pictures."""

    def position_arguments(self, ids: Int[Tensor, "B L"]) -> dict[str, Tensor]:
        """Arguments that position ids are computed from."""

    def embed_images(self, visuals: list[VisualInput]) -> list[Float[Tensor, "n D"]]:
        """Image features as the language model takes them, one tensor per image."""

    def cached_image_arguments(
        self, features: list[Float[Tensor, "n D"]], visuals: list[VisualInput]
    ) -> dict[str, Any]:
        """``image_arguments`` from features that were computed before."""


class _Base:
    """What both families share."""

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: Any,
        pad_square: bool,
        stretch_to: int | None = None,
    ) -> None:
        self.model = model
        self.image_processor = image_processor
        self.pad_square = pad_square
        self.stretch_to = stretch_to

    @property
    def layers(self) -> nn.ModuleList:
        layers = self.model.model.language_model.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def final_norm(self) -> nn.Module:
        norm = self.model.model.language_model.norm
        assert isinstance(norm, nn.Module)
        return norm

    @property
    def image_token_id(self) -> int:
        return int(self.model.config.image_token_id)

    @property
    def placeholder_ids(self) -> list[int]:
        video = getattr(self.model.config, "video_token_id", None)
        return [self.image_token_id] if video is None else [self.image_token_id, int(video)]

    def _fit(self, image: np.ndarray) -> Fit:
        """Whether the policy sees the picture on a square, or stretched to its grid."""
        return "square" if self.pad_square else "stretch"

    def _framed(self, image: np.ndarray) -> np.ndarray:
        if self._fit(image) == "square":
            red, green, blue = (round(255 * c) for c in self.image_processor.image_mean)
            image = pad_to_square(shrink(image, _MAX_SQUARE), (red, green, blue))
        return image if self.stretch_to is None else stretch(image, self.stretch_to)

    def _boxes(self, grid: tuple[int, int], image: np.ndarray) -> Float[np.ndarray, "n 4"]:
        return token_boxes(grid, (image.shape[0], image.shape[1]), fit=self._fit(image))


class QwenBackbone(_Base):
    """Qwen2.5-VL: native aspect ratio, merged patches, 3-D positions."""

    @property
    def vision(self) -> nn.Module:
        tower = self.model.model.visual
        assert isinstance(tower, nn.Module)
        return tower

    def _fit(self, image: np.ndarray) -> Fit:
        short, long = sorted(image.shape[:2])
        refused = self.stretch_to is None and long > _MAX_STRETCH * short
        return "square" if self.pad_square or refused else "stretch"

    def prepare(self, image: np.ndarray) -> VisualInput:
        framed = self._framed(image)
        features = self.image_processor(images=[Image.fromarray(framed)], return_tensors="pt")
        merge = self.image_processor.merge_size
        _, rows, columns = features["image_grid_thw"][0].tolist()
        grid = (rows // merge, columns // merge)
        return VisualInput(features["pixel_values"], grid, self._boxes(grid, image))

    def _grids(self, visuals: list[VisualInput]) -> Int[Tensor, "B 3"]:
        merge = self.image_processor.merge_size
        rows = [(1, v.grid[0] * merge, v.grid[1] * merge) for v in visuals]
        return torch.tensor(rows, device=self.model.device)

    def image_arguments(self, visuals: list[VisualInput]) -> dict[str, Tensor]:
        pixels = torch.cat([v.pixels for v in visuals]).to(self.model.device, self.model.dtype)
        return {"pixel_values": pixels, "image_grid_thw": self._grids(visuals)}

    def position_arguments(self, ids: Int[Tensor, "B L"]) -> dict[str, Tensor]:
        # Without token types the positions silently become those of plain text.
        return {"mm_token_type_ids": (ids == self.image_token_id).int()}

    def embed_images(self, visuals: list[VisualInput]) -> list[Float[Tensor, "n D"]]:
        arguments = self.image_arguments(visuals)
        output = self.model.model.get_image_features(**arguments, return_dict=True)
        return list(output.pooler_output)

    def cached_image_arguments(
        self, features: list[Float[Tensor, "n D"]], visuals: list[VisualInput]
    ) -> dict[str, Any]:
        output = BaseModelOutputWithPooling(pooler_output=tuple(features))  # type: ignore[arg-type]
        return {"mm_encoder_outputs": {"image": output}, "image_grid_thw": self._grids(visuals)}


class LlavaBackbone(_Base):
    """LLaVA-1.5: CLIP at a fixed size; the picture is padded to a square so no border is lost."""

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: Any,
        pad_square: bool,
        stretch_to: int | None = None,
    ) -> None:
        if not pad_square:
            raise ValueError("LLaVA's image processor crops to a square; set pad_to_square: true")
        if model.config.vision_feature_select_strategy != "default":
            raise ValueError(
                "LLaVA's class token stands nowhere in the picture; drop it: set "
                "vision_feature_select_strategy to default"
            )
        super().__init__(model, image_processor, pad_square, stretch_to)

    @property
    def vision(self) -> nn.Module:
        inner = self.model.model
        return nn.ModuleList([inner.vision_tower, inner.multi_modal_projector])

    def prepare(self, image: np.ndarray) -> VisualInput:
        framed = self._framed(image)
        features = self.image_processor(images=[Image.fromarray(framed)], return_tensors="pt")
        pixels = features["pixel_values"]
        side = pixels.shape[-1] // self.model.config.vision_config.patch_size
        return VisualInput(pixels, (side, side), self._boxes((side, side), image))

    def image_arguments(self, visuals: list[VisualInput]) -> dict[str, Tensor]:
        pixels = torch.cat([v.pixels for v in visuals])
        return {"pixel_values": pixels.to(self.model.device, self.model.dtype)}

    def position_arguments(self, ids: Int[Tensor, "B L"]) -> dict[str, Tensor]:
        return {}

    def embed_images(self, visuals: list[VisualInput]) -> list[Float[Tensor, "n D"]]:
        config = self.model.config
        output = self.model.model.get_image_features(
            **self.image_arguments(visuals),
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            return_dict=True,
        )
        return list(output.pooler_output)

    def cached_image_arguments(
        self, features: list[Float[Tensor, "n D"]], visuals: list[VisualInput]
    ) -> dict[str, Any]:
        output = BaseModelOutputWithPooling(pooler_output=list(features))  # type: ignore[arg-type]
        return {"mm_encoder_outputs": {"image": output}}


FAMILIES: dict[str, tuple[type[PreTrainedModel], type[QwenBackbone] | type[LlavaBackbone]]] = {
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, QwenBackbone),
    "llava": (LlavaForConditionalGeneration, LlavaBackbone),
}


def family_of(model_type: str) -> str:
    """The family's key; raises ValueError naming the supported ones."""
    if model_type not in FAMILIES:
        raise ValueError(f"unsupported policy {model_type!r}; supported: {', '.join(FAMILIES)}")
    return model_type
