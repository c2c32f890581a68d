"""The encoders of nano's sizes, side by side."""

from __future__ import annotations

import torch
from transformers import SamModel

from segcompass.grounding.image_encoder import ImageEncoder, sam_config


def test_sizes_differ_in_the_encoder_alone() -> None:
    counts, decoders = [], set()
    for name in ("nano-s", "nano", "nano-l"):
        sam = SamModel(sam_config(name))
        encoder = ImageEncoder(sam)
        keys = encoder(torch.zeros(1, 3, encoder.side, encoder.side))
        assert keys.shape == (1, 64, 20, 20)
        counts.append(sum(p.numel() for p in sam.vision_encoder.parameters()))
        decoders.add(sum(p.numel() for p in sam.mask_decoder.parameters()))
    assert counts == sorted(set(counts)) and len(decoders) == 1
