"""Image keys: SAM's vision encoder, its sizes, and how pictures reach it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import SamConfig, SamModel
from transformers.models.sam.configuration_sam import (
    SamMaskDecoderConfig,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from segcompass.geometry import Frame, to_frame

PIXEL_MEAN = (123.675, 116.28, 103.53)  # SAM's, on the 0…255 scale
PIXEL_STD = (58.395, 57.12, 57.375)

_VIT = {  # width, layers, heads, layers with global attention
    "vit-b": (768, 12, 12, (2, 5, 8, 11)),
    "vit-l": (1024, 24, 16, (5, 11, 17, 23)),
    "vit-h": (1280, 32, 16, (7, 15, 23, 31)),
}
_NANO = {"nano": (96, 4), "nano-s": (64, 2), "nano-l": (128, 6)}  # width, layers
SIZES = (*_NANO, *_VIT)
_POSITIONS: dict[str, Any] = {"scale": 1}  # std of the random positional frequencies


def sam_config(name: str) -> SamConfig:
    """Sizes of a segmenter by name, fit both for loading weights and for training from scratch.

    Two of transformers' defaults only suit checkpoints and would cripple a new model: the vision
    encoder's weights start at std 1e-10, and the positional frequencies at std width / 2, where
    SAM itself has 1. Both are set here; loaded weights replace them anyway.

    Args:
        name: ``vit-b``, ``vit-l``, ``vit-h`` (the released SAM sizes), ``nano``, or for comparison
            ``nano-s`` and ``nano-l``.

    Returns:
        A config for ``transformers.SamModel``.

    Raises:
        ValueError: If the name is unknown.
    """
    if name in _NANO:
        return _nano_config(*_NANO[name])
    if name not in _VIT:
        raise ValueError(f"unknown segmenter {name!r}; choose one of {list(SIZES)}")
    width, layers, heads, global_layers = _VIT[name]
    vision = SamVisionConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        global_attn_indexes=list(global_layers),
        initializer_range=0.02,
        **_POSITIONS,
    )
    return SamConfig(vision_config=vision)


def _nano_config(width: int, layers: int) -> SamConfig:
    """A segmenter of under 2 M parameters: 160 px, patches of 8, a 20×20 grid of 64 channels."""
    side, patch, channels = 160, 8, 64
    vision = SamVisionConfig(
        image_size=side,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        mlp_dim=4 * width,
        output_channels=channels,
        window_size=10,
        global_attn_indexes=list(range(1, layers, 2)),
        num_pos_feats=channels // 2,  # sine and cosine fill the channels of the keys
        use_rel_pos=False,  # saves 40 % of the time; the absolute positions remain
        initializer_range=0.06,  # about 1/sqrt(3 * width), torch's own start
        **_POSITIONS,
    )
    prompt = SamPromptEncoderConfig(
        image_size=side, patch_size=patch, hidden_size=channels, mask_input_channels=16
    )
    decoder = SamMaskDecoderConfig(
        hidden_size=channels,
        mlp_dim=256,
        num_attention_heads=4,
        attention_downsample_rate=2,
        iou_head_hidden_dim=channels,
    )
    return SamConfig(
        vision_config=vision,
        prompt_encoder_config=prompt,
        mask_decoder_config=decoder,
        initializer_range=0.07,
    )


class FramedPictures(nn.Module, ABC):
    """How pictures of any size reach a segmenter: in its square frame, normalised, as a batch."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @abstractmethod
    def frame(self, hw: tuple[int, int]) -> Frame:
        """Where a picture of this height and width lies in the frame."""

    def preprocess(
        self, images: Sequence[np.ndarray]
    ) -> tuple[Float[Tensor, "B 3 side side"], list[Frame]]:
        """Scale, normalise and pad images of any size into one batch.

        Source: SAM's preprocessing; the padding is zero *after* normalisation.

        Args:
            images: uint8 (height, width, 3) each, RGB.

        Returns:
            Pixels on the encoder's device, and each image's frame.

        Raises:
            ValueError: If there is no image, or one is not uint8 RGB.
        """
        if not images:
            raise ValueError("no images to encode; pass at least one")
        frames = [self.frame(image.shape[:2]) for image in images]
        stacked = np.stack(
            [to_frame(image, frame) for image, frame in zip(images, frames, strict=True)]
        )
        return self.normalise(stacked, frames), frames

    def normalise(
        self, framed: UInt8[np.ndarray, "B side side 3"], frames: Sequence[Frame]
    ) -> Float[Tensor, "B 3 side side"]:
        """Framed pictures (``to_frame``) as the encoder takes them, zero on the padding."""
        pixels = torch.from_numpy(framed).to(self.mean.device).permute(0, 3, 1, 2)
        pixels = (pixels.to(self.mean.dtype) - self.mean) / self.std
        for row, frame in zip(pixels, frames, strict=True):
            row[:, frame.scaled_hw[0] :] = 0
            row[:, :, frame.scaled_hw[1] :] = 0
        return pixels


class ImageEncoder(FramedPictures):
    """Encode images into keys (Eq. 2, ``K = F_enc(x_img)``) with SAM's vision encoder.

    The module borrows ``sam.vision_encoder``: training it trains ``sam``, and
    ``sam.save_pretrained`` writes it to a plain Hugging Face folder.
    """

    def __init__(self, sam: SamModel) -> None:
        """Take the vision encoder of ``sam``; raises ValueError for sizes SAM cannot frame."""
        config = cast(SamVisionConfig, sam.config.vision_config)
        if not isinstance(config.image_size, int) or not isinstance(config.patch_size, int):
            raise ValueError(
                f"the segmenter's frame must be square with square patches, got image_size="
                f"{config.image_size} and patch_size={config.patch_size}"
            )
        if config.image_size % config.patch_size:
            raise ValueError(
                f"image_size {config.image_size} is no multiple of patch_size {config.patch_size}"
            )
        super().__init__(config.image_size)
        self.vision_encoder = sam.vision_encoder
        self.grid = config.image_size // config.patch_size
        self.channels = config.output_channels

    def frame(self, hw: tuple[int, int]) -> Frame:
        return Frame.fit(hw, self.side)

    def forward(self, pixels: Float[Tensor, "B 3 side side"]) -> Float[Tensor, "B C h w"]:
        """Encode preprocessed pixels into image keys; raises ValueError for another size."""
        keys: Tensor = self.vision_encoder(pixels).last_hidden_state
        return keys
