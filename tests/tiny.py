"""Tiny random checkpoints on disk, the way users have them, and a few scenes.

The policies are plain Hugging Face folders of both families whose tokenizers know nothing of the
concentration tokens. Sizes are small, the structure is that of the real ones: untied embeddings,
grouped keys, windowed vision layers, frames of two. Qwen's tokenizer is a byte-level BPE in which
`<think>` takes several tokens, and its vocabulary has spare rows; LLaVA's falls back to bytes and
holds `<think>` whole, and its vocabulary has to grow.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SamConfig,
    SamModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.data.scenes.writer import write_scenes
from segcompass.grounding.slot_mapper import SlotMapperConfig
from segcompass.interfaces.concept_slots import HeadConfig
from segcompass.model_folder import ModelConfig, build_interface, save_model
from segcompass.reasoning.from_scratch import build_tokenizer
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import PolicyConfig
from segcompass.reasoning.prompts import (
    LLAVA_TEMPLATE,
    NANO_TEMPLATE,
    QWEN_TEMPLATE,
    Prompt,
    PromptConfig,
    concentration_tokens,
)

QWEN_CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WIDTH, LAYERS, HEADS, LATENTS = 32, 3, 4, 64
TEXTS = (
    "Segment everything one could drink from, please.",
    "There is a large red mug at b3. So the targets are the red mug at b3 and the blue mug at f6.",
    "First reason step by step inside, then write the tokens and nothing else.",
)


def llava_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces with byte fallback, and LLaVA's control tokens."""
    tokenizer = build_tokenizer(TEXTS, vocabulary=420, slots=0)
    tokenizer.add_tokens(["<s>", "<image>"], special_tokens=True)
    return tokenizer


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's control tokens; `<tool_call>` is one that is not "special"."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=sorted(alphabet), show_progress=False
    )
    raw.train_from_iterator([*TEXTS, "<think> a </think>\n\n"], trainer)
    raw.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in QWEN_CONTROL])
    raw.add_tokens([AddedToken("<tool_call>", normalized=False, special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )


@cache
def prompt_of(
    kind: str, slots: int = 6, limit: int = 600, form: str = "slots", canvas_side: int = 840
) -> Prompt:
    """Prompts for the tokenizer of "qwen", "llava" or "nano", concentration tokens added."""
    template = {"qwen": QWEN_TEMPLATE, "llava": LLAVA_TEMPLATE, "nano": NANO_TEMPLATE}[kind]
    if kind == "nano":
        tokenizer = build_tokenizer(TEXTS, 420, slots)
    else:
        tokenizer = qwen_tokenizer() if kind == "qwen" else llava_tokenizer()
        tokenizer.add_tokens(concentration_tokens(slots), special_tokens=True)
    image = tokenizer.convert_tokens_to_ids("<image>" if kind == "llava" else "<|image_pad|>")
    config = PromptConfig.model_validate(
        {
            "template": template,
            "form": form,
            "slots": slots,
            "canvas_side": canvas_side,
            "max_instruction_tokens": limit,
        }
    )
    return Prompt(config, tokenizer, image, tokenizer.eos_token_id)


def write_policy(folder: Path, family: str, seed: int = 0, **text: Any) -> Path:
    """A plain Hugging Face folder of either family."""
    write = tiny_qwen_policy if family == "qwen2_5_vl" else tiny_llava_policy
    return write(folder, seed, **text)


def tiny_qwen_policy(folder: Path, seed: int = 0, **text: Any) -> Path:
    """A Qwen2.5-VL folder; ``text`` changes the language model's config."""
    tokenizer = qwen_tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 30,
            **_language(tokenizer),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [2, 1, 1],
            },
            **text,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 8,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "out_hidden_size": WIDTH,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    processor = Qwen2VLImageProcessorPil(
        patch_size=8,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 32**2, "longest_edge": 64**2},
    )
    return _save(folder, Qwen2_5_VLForConditionalGeneration(config), tokenizer, processor)


def tiny_llava_policy(folder: Path, seed: int = 0, **text: Any) -> Path:
    """A LLaVA-1.5 folder: CLIP and Llama; ``text`` changes the language model's config."""
    tokenizer = llava_tokenizer()
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            **_language(tokenizer),
            **text,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 16,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    return _save(folder, LlavaForConditionalGeneration(config), tokenizer, processor)


def policy_config(family: str, **changes: Any) -> PolicyConfig:
    """How a tiny policy of this family is used; K is 6 unless changed."""
    prompt = {
        "template": QWEN_TEMPLATE if family == "qwen2_5_vl" else LLAVA_TEMPLATE,
        "slots": changes.pop("slots", 6),
        "max_instruction_tokens": changes.pop("max_instruction_tokens", 600),
    }
    settings = {"sae_layer": 1, "pad_to_square": family == "llava", "max_new_tokens": 32}
    return PolicyConfig(prompt=PromptConfig(**prompt), **{**settings, **changes})


def tiny_sam(seed: int = 0) -> SamModel:
    """A segmenter with a side of 64 px, patches of 8 and 32 channels."""
    torch.manual_seed(seed)
    return SamModel(
        SamConfig(
            vision_config={
                "image_size": 64,
                "patch_size": 8,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "output_channels": 32,
                "num_pos_feats": 16,
                "window_size": 4,
                "global_attn_indexes": [1],
                "initializer_range": 0.1,
                "scale": 1,
            },
            prompt_encoder_config={"image_size": 64, "patch_size": 8, "hidden_size": 32},
            mask_decoder_config={
                "hidden_size": 32,
                "mlp_dim": 32,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 32,
            },
            initializer_range=0.3,
        )
    )


def tiny_sae(width: int = WIDTH, seed: int = 0) -> SparseAutoencoder:
    """A sparse autoencoder of 64 latents."""
    torch.manual_seed(seed)
    return SparseAutoencoder(SparseAutoencoderConfig(d_in=width, d_sae=LATENTS))


def tiny_head() -> HeadConfig:
    """Sizes of a small head."""
    return HeadConfig(
        codebook_width=16,
        codebook_layers=1,
        codebook_heads=2,
        codebook_ffn=24,
        mapper=SlotMapperConfig(heads=2, head_width=8),
    )


def tiny_model_folder(
    folder: Path, family: str = "qwen2_5_vl", seed: int = 0, **changes: Any
) -> Path:
    """A complete model folder of random parts; ``changes`` go to :func:`policy_config`."""
    plain = write_policy(folder.with_name(f"{folder.name}-policy"), family, seed)
    config = ModelConfig(
        name=f"tiny-{family}",
        policy=policy_config(family, **changes),
        head=tiny_head(),
    )
    policy = load_policy(plain, config.policy)
    sam, sae = tiny_sam(seed), tiny_sae(seed=seed)
    torch.manual_seed(seed)
    interface = build_interface(config, policy, sam, sae)
    save_model(folder, config, policy, sam, interface)
    return folder


def tiny_scenes(folder: Path, seed: int = 0) -> Path:
    """A few questions of every split, in all layouts."""
    counts = {"train": 8, "val": 4, "testA": 2, "testB": 2}
    write_scenes(folder, counts, seed, workers=1, size=96)
    return folder


def _language(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,  # so that states and answers depend visibly on the input
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _save(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast, processor: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
