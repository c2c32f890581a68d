"""Tiny random checkpoints in the layout that Seg-Zero, VisionReasoner and SAM 2 are published in.

Their policies are plain Qwen2.5-VL folders whose tokenizer brings a chat template, without a
segcompass.json; SAM 2 is published as a `Sam2VideoModel`, of which pictures need a part.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from tiny import tiny_qwen_policy
from torch.nn.functional import interpolate
from transformers import AutoTokenizer, Sam2Config, Sam2Model, Sam2VideoConfig, Sam2VideoModel

from segcompass.io.assets import ASSETS

SIDE = 64  # px of SAM 2's frame; 1024 in the published one
_SIZES: dict[str, Any] = {
    "vision_config": {
        "model_type": "sam2_vision_model",
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 8,
            "image_size": [SIDE, SIDE],
            "blocks_per_stage": [1, 1, 2, 1],
            "embed_dim_per_stage": [8, 16, 32, 64],
            "num_attention_heads_per_stage": [1, 2, 4, 8],
            "window_size_per_stage": [4, 2, 4, 2],
            "global_attention_blocks": [3],
            "window_positional_embedding_background_size": [2, 2],
            "initializer_range": 0.3,
        },
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 32,
        "initializer_range": 0.3,
    },
    "prompt_encoder_config": {"image_size": SIDE, "patch_size": 16, "hidden_size": 32},
    "mask_decoder_config": {
        "hidden_size": 32,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 32,
    },
    "initializer_range": 0.3,
}


# Roles, and a picture between two marks: what Qwen2.5-VL's own template makes of one question.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_sam2(seed: int = 0) -> Sam2Model:
    """SAM 2 with a frame of 64 px and keys of 16, 8 and 4 cells a side."""
    torch.manual_seed(seed)
    sam = Sam2Model(Sam2Config(**deepcopy(_SIZES))).eval()
    with torch.no_grad():  # zero in a new model, not in the published ones
        sam.no_memory_embedding.normal_()
    return sam


def write_sam2(folder: Path, seed: int = 0) -> Path:
    """A folder as SAM 2 is published: the weights of the video model, memory included."""
    torch.manual_seed(seed)
    memory = {
        "memory_attention_hidden_size": 32,
        "memory_attention_num_layers": 1,
        "memory_attention_num_attention_heads": 1,
        "memory_attention_feed_forward_hidden_size": 32,
        "memory_attention_rope_feat_sizes": [4, 4],
        "memory_encoder_hidden_size": 32,
        "memory_encoder_output_channels": 16,
        "mask_downsampler_embed_dim": 32,
        "memory_fuser_embed_dim": 32,
        "memory_fuser_intermediate_dim": 32,
        "image_size": SIDE,
    }
    model = Sam2VideoModel(Sam2VideoConfig(**deepcopy(_SIZES), **memory))
    with torch.no_grad():
        model.no_memory_embedding.normal_()
    model.save_pretrained(folder)
    return folder


def write_reasoner(folder: Path, seed: int = 0) -> Path:
    """A folder as Seg-Zero is published: Qwen2.5-VL with its chat template, nothing of ours."""
    tiny_qwen_policy(folder, seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def write_preset(folder: Path) -> Path:
    """The preset of Seg-Zero, but for its parts: two tiny folders beside it."""
    write_reasoner(folder / "Seg-Zero-tiny")
    write_sam2(folder / "sam2-tiny")
    preset = yaml.safe_load((ASSETS / "presets" / "seg-zero-7b.yaml").read_text())
    preset |= {"policy": "Seg-Zero-tiny", "segmenter": "sam2-tiny", "dtype": "float32"}
    preset["model"]["policy"] |= {"max_new_tokens": 200}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(preset))
    return path


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """With ImageNet's statistics, as SAM 2's image processor does it."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels / 255 - mean[:, None, None]) / std[:, None, None]


@torch.no_grad()
def sam2_mask(
    sam: Sam2Model, picture: np.ndarray, box: np.ndarray | None, point: np.ndarray | None
) -> tuple[torch.Tensor, float]:
    """One prompt for one picture through `Sam2Model.forward`; prompts in px of the picture."""
    scaled = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    scale = torch.tensor([SIDE / picture.shape[1], SIDE / picture.shape[0]])
    output = sam(
        pixel_values=normalised(torch.from_numpy(np.array(scaled)).permute(2, 0, 1))[None],
        input_boxes=None if box is None else torch.from_numpy(box)[None, None] * scale.repeat(2),
        input_points=None if point is None else torch.from_numpy(point)[None, None] * scale,
        multimask_output=True,
    )
    best = int(output.iou_scores[0, 0].argmax())
    size = (picture.shape[0], picture.shape[1])
    mask = interpolate(output.pred_masks[0], size, mode="bilinear")[0, best]
    return mask, float(output.iou_scores[0, 0, best])
