"""The real models by name: published sizes, and how a policy, a segmenter and a head fit together.

A preset is instantiated without memory (on the meta device), so that shapes, parameter counts and
the choice of trained parts can be checked anywhere: `segcompass doctor --preset qwen2.5-vl-7b`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    SamConfig,
    SamModel,
)

from segcompass.concepts.query_codebook import ConceptVectors
from segcompass.concepts.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.grounding.image_encoder import ImageEncoder, sam_config
from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.grounding.slot_mapper import SlotMapperConfig
from segcompass.interfaces.concept_slots import ConceptSlots, HeadConfig
from segcompass.io.errors import ConfigError
from segcompass.published import preset_names
from segcompass.reasoning.backbones import FAMILIES, Backbone, family_of
from segcompass.reasoning.policy import PolicyConfig
from segcompass.reasoning.prompts import LLAVA_TEMPLATE, QWEN_TEMPLATE, PromptConfig
from segcompass.reasoning.state_tap import StateTap
from segcompass.types import SparseCodes

_TOKENS, _ACTIVE = 640, 64  # of the sequence whose shapes are checked: length, codes a token
_CONFIGS: dict[str, type[PretrainedConfig]] = {
    "qwen2_5_vl": Qwen2_5_VLConfig,
    "llava": LlavaConfig,
}

_QWEN_7B: dict[str, Any] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": False,
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": [16, 24, 24],
        },
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "out_hidden_size": 3584,
        "tokens_per_second": 2,
    },
}
_CLIP_L_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _llava(width: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    """LLaVA-1.5 around a Vicuna of these sizes."""
    return {
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": _CLIP_L_336,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 32064,
            "hidden_size": width,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 32001,
        },
    }


class Preset(NamedTuple):
    """A real policy, a segmenter and a head; sizes as published."""

    hub_id: str
    family: str
    policy: dict[str, Any]  # the published config.json, without what has no effect on sizes
    use: PolicyConfig
    segmenter: str = "vit-h"
    latents: int = 65_536  # S
    head: HeadConfig = HeadConfig(
        codebook_width=512,
        codebook_layers=2,
        codebook_heads=8,
        codebook_ffn=2048,
        mapper=SlotMapperConfig(heads=4, head_width=64),
    )


def _use(template: str, sae_layer: int, pad_to_square: bool) -> PolicyConfig:
    prompt = PromptConfig(template=template, slots=6)
    return PolicyConfig(
        prompt=prompt, sae_layer=sae_layer, pad_to_square=pad_to_square, max_new_tokens=2000
    )


PRESETS: dict[str, Preset] = {
    "qwen2.5-vl-7b": Preset(
        "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", _QWEN_7B, _use(QWEN_TEMPLATE, 12, False)
    ),
    "llava-1.5-7b": Preset(
        "llava-hf/llava-1.5-7b-hf",
        "llava",
        _llava(4096, 11008, layers=32, heads=32),
        _use(LLAVA_TEMPLATE, 15, True),
    ),
    "llava-1.5-13b": Preset(
        "llava-hf/llava-1.5-13b-hf",
        "llava",
        _llava(5120, 13824, layers=40, heads=40),
        _use(LLAVA_TEMPLATE, 15, True),
    ),
}


SEGMENTERS = {  # hub ids of the segmenters that come in a published size
    "facebook/sam-vit-base": "vit-b",
    "facebook/sam-vit-large": "vit-l",
    "facebook/sam-vit-huge": "vit-h",
}


def find_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        ConfigError: naming the presets there are.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        if name in preset_names():
            hint = f"; {name} is a published model to use: segcompass predict --model {name}"
        raise ConfigError(f"no preset {name!r}, there are {', '.join(PRESETS)}{hint}")
    return PRESETS[name]


def preset_of(hub_id: str) -> Preset | None:
    """The preset that is published under this id, if any."""
    return next((p for p in PRESETS.values() if p.hub_id == hub_id), None)


def published_config(preset: Preset) -> PretrainedConfig:
    """The policy's config, with the published sizes."""
    return _CONFIGS[preset.family](**preset.policy)


class Parts(NamedTuple):
    """A whole model without memory: shapes and parameters, no values."""

    backbone: Backbone
    sam: SamModel
    encoder: ImageEncoder
    interface: ConceptSlots


def assemble(
    policy: PretrainedConfig,
    use: PolicyConfig,
    segmenter: SamConfig,
    latents: int,
    head: HeadConfig,
) -> Parts:
    """Put a model of these sizes together on the meta device.

    Raises:
        ValueError: if the parts do not fit together, or the family is unknown.
    """
    model_class, backbone_class = FAMILIES[family_of(policy.model_type)]
    with torch.device("meta"):
        model: PreTrainedModel = model_class(policy)
        backbone = backbone_class(model, None, use.pad_to_square)
        sam = SamModel(segmenter)
        width = int(model.config.get_text_config().hidden_size)
        sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=width, d_sae=latents))
        interface = ConceptSlots(
            head, sae, MaskDecoder(sam), policy_width=width, slots=use.prompt.slots
        )
        return Parts(backbone, sam, ImageEncoder(sam), interface)


def describe(name: str) -> dict[str, Any]:
    """Instantiate a preset without memory, run the shapes through it, and count parameters.

    Args:
        name: A key of ``PRESETS``.

    Returns:
        Names, the shape of every intermediate, and parameters by part: ``total`` and how many of
        them joint training trains (the policy's layers after the SAE layer, the head, the decoder).

    Raises:
        ConfigError: if there is no such preset.
        ValueError: if the parts' shapes disagree.
    """
    preset = find_preset(name)
    segmenter = sam_config(preset.segmenter)
    parts = assemble(published_config(preset), preset.use, segmenter, preset.latents, preset.head)
    with torch.device("meta"):
        shapes = _shapes(preset.use, parts)
    return {
        "preset": name,
        "hub id": preset.hub_id,
        "policy": type(parts.backbone.model).__name__,
        "SAE layer": preset.use.sae_layer,
        "shapes": {part: "×".join(map(str, shape)) for part, shape in shapes.items()},
        "parameters": _counts(preset.use, parts),
    }


@torch.no_grad()
def _shapes(use: PolicyConfig, parts: Parts) -> dict[str, tuple[int, ...]]:
    """The path of one picture and ``_TOKENS`` tokens; inside ``torch.device("meta")``."""
    backbone, _, encoder, interface = parts
    language: Any = backbone.model.get_submodule("model.language_model")
    tap = StateTap()
    with tap.armed(backbone.layers[use.sae_layer], backbone.final_norm):
        mask = torch.empty(1, 1, _TOKENS, _TOKENS, dtype=torch.bool)  # else values are looked at
        states = torch.empty(1, _TOKENS, interface.sae.config.d_in)
        language(inputs_embeds=states, attention_mask=mask, use_cache=False)
    keys: Tensor = encoder(torch.empty(1, 3, encoder.side, encoder.side))
    concepts = _concepts(interface, tap.sae[0])
    tokens = tap.final[0][:, -use.prompt.slots :]
    queries = interface.fusion(tokens, concepts.vectors)
    slots = interface.mapper(queries, keys)
    masks = interface.decoder(keys, slots.heatmap_logits)
    found = {
        "SAE states (B L D)": tap.sae[0],
        "concept vectors (B K C)": concepts.vectors,
        "slot queries (B K Q)": queries,
        "image keys (B C h w)": keys,
        "head scores (B K H h w)": slots.scores,
        "heatmaps (B K h w)": slots.heatmap_logits,
        "confidences (B K)": slots.confidence_logits,
        "masks (B K 4h 4w)": masks,
    }
    return {part: tuple(tensor.shape) for part, tensor in found.items()}


def _concepts(interface: ConceptSlots, states: Tensor) -> ConceptVectors:
    """Concept vectors of made-up codes: which ones are active depends on values, not on shapes."""
    interface.sae.encode(states[0, :1])
    rows = torch.arange(_TOKENS).repeat_interleave(_ACTIVE)
    columns, values = torch.zeros_like(rows), torch.empty(len(rows))
    codes = SparseCodes(rows, columns, values, _TOKENS, interface.sae.config.d_sae)
    result: ConceptVectors = interface.codebook(codes, torch.ones(1, _TOKENS, dtype=torch.bool))
    return result


def _counts(use: PolicyConfig, parts: Parts) -> dict[str, dict[str, int]]:
    """Parameters by part, ``total`` and ``trainable`` in joint training."""
    backbone, sam, _, interface = parts
    frozen = nn.ModuleList(backbone.layers[: use.sae_layer + 1])
    trained = nn.ModuleList([*backbone.layers[use.sae_layer + 1 :], backbone.final_norm])
    everything = _size([backbone.model])
    inside = _size([backbone.vision]), _size([frozen]), _size([trained])
    whole_decoder = _size([sam]) - _size([sam.vision_encoder])
    counts = {
        "policy, vision tower": (inside[0], 0),
        "policy, layers up to the SAE": (inside[1], 0),
        "policy, layers after the SAE": (inside[2], inside[2]),
        "policy, embeddings and the rest": (everything - sum(inside), 0),
        "sparse autoencoder": (_size([interface.sae]), 0),
        "query codebook": (_size([interface.codebook]),) * 2,
        "fusion": (_size([interface.fusion]),) * 2,
        "slot mapper": (_size([interface.mapper]),) * 2,
        "segmenter, image encoder": (_size([sam.vision_encoder]), 0),
        "segmenter, mask decoder": (whole_decoder, _size([interface.decoder], trainable=True)),
    }
    counts["all"] = (sum(t for t, _ in counts.values()), sum(t for _, t in counts.values()))
    return {part: {"total": t, "trainable": n} for part, (t, n) in counts.items()}


def _size(modules: Iterable[nn.Module], *, trainable: bool = False) -> int:
    """Parameters, each counted once however often it is shared."""
    found = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() for p in found.values() if p.requires_grad or not trainable)
