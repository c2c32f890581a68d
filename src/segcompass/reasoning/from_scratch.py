"""Build a small policy from nothing: a real Qwen2.5-VL architecture and a word-piece tokenizer.

This is how the bundled nano model begins; a 7B policy is loaded instead.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Self

import torch
from pydantic import BaseModel, Field, model_validator
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from segcompass.io.errors import ConfigError
from segcompass.reasoning.prompts import THINK_CLOSE, THINK_OPEN, concentration_tokens

MERGE = 2  # patches along a side of an image token
CONTROL = ("<|pad|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>")
_SPACE = "▁"  # how SentencePiece-style tokenizers write a leading blank
_PIECES = r"[A-Za-z]+|[0-9]|[^A-Za-z0-9\s]"


class ScratchConfig(BaseModel, frozen=True, extra="forbid"):
    """Sizes of a policy that is trained from nothing."""

    width: int = Field(192, ge=1, description="D; a multiple of 2·heads")
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    ffn: int = Field(512, ge=1)
    vision_width: int = Field(128, ge=1, description="a multiple of 4·vision_heads")
    vision_layers: int = Field(4, ge=1)
    vision_heads: int = Field(2, ge=1)
    vision_ffn: int = Field(256, ge=1)
    image_side: int = Field(
        128, ge=1, description="px; pictures are scaled to about this side; at least 2·patch"
    )
    patch: int = Field(8, ge=1, description="px")
    vocabulary: int = Field(
        1024, ge=1, description="most entries of the tokenizer, control included"
    )

    @model_validator(mode="after")
    def _can_be_built(self) -> Self:
        # Rotary embeddings turn pairs of channels; the vision tower's, for rows and for columns.
        for name, heads, each in (("width", "heads", 2), ("vision_width", "vision_heads", 4)):
            multiple = each * getattr(self, heads)
            if getattr(self, name) % multiple:
                raise ValueError(
                    f"{name} must be a multiple of {each}·{heads} = {multiple}, "
                    f"got {getattr(self, name)}"
                )
        if self.image_side < MERGE * self.patch:
            raise ValueError(
                f"image_side must be at least {MERGE}·patch = {MERGE * self.patch}, "
                f"got {self.image_side}"
            )
        return self


def build_tokenizer(texts: Iterable[str], vocabulary: int, slots: int) -> PreTrainedTokenizerFast:
    """A unigram tokenizer that knows the words of ``texts`` whole, and every byte.

    Digits and JSON marks are entries of their own. Anything else (other scripts, emoji) falls
    back to single bytes, so no text is unknown.

    Raises:
        ConfigError: if the vocabulary has no room for bytes, letters and control tokens.
    """
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    special = [*CONTROL, THINK_OPEN, THINK_CLOSE, *concentration_tokens(slots)]
    letters = [chr(c) for c in range(33, 127)]
    least = len(bytes_) + len(special) + len(letters) + 1
    if vocabulary < least:
        raise ConfigError(
            f"a tokenizer of {vocabulary} entries has no room for bytes, letters and "
            f"{len(special)} control tokens; set policy.scratch.vocabulary to {least} or more"
        )
    words: Counter[str] = Counter()
    for text in texts:
        for match in re.finditer(_PIECES, text):
            spaced = match.start() == 0 or text[match.start() - 1] == " "
            words[(_SPACE if spaced else "") + match.group()] += 1
    kept = [w for w, _ in words.most_common() if w not in letters][: vocabulary - least]
    total = sum(words.values())
    pieces = [(w, math.log(words[w] / total)) for w in kept]
    pieces += [(c, math.log(max(words[c], 0.01) / total)) for c in letters]
    pieces.append((_SPACE, math.log(0.01 / total)))
    floor = min(score for _, score in pieces) - 5.0
    table = [("<|pad|>", 0.0)] + [(b, floor - 5.0) for b in bytes_] + pieces
    raw = RawTokenizer(models.Unigram(table, unk_id=0, byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.NFC()])
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first"),
            pre_tokenizers.Split(
                Regex(rf"{_SPACE}?(?:[A-Za-z]+|[0-9]|[^A-Za-z0-9{_SPACE}])"), "isolated"
            ),
        ]
    )
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    raw.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=raw,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_image_processor(config: ScratchConfig) -> Qwen2VLImageProcessorPil:
    """Scale every picture to about ``image_side``² pixels in whole merged patches."""
    pixels = config.image_side**2
    return Qwen2VLImageProcessorPil(
        patch_size=config.patch,
        temporal_patch_size=1,
        merge_size=MERGE,
        size={"shortest_edge": pixels, "longest_edge": pixels},
    )


def build_model(
    config: ScratchConfig, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised Qwen2.5-VL of the given sizes."""
    torch.manual_seed(seed)
    half = config.width // config.heads // 2
    third = half // 3
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.width,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [half - 2 * third, third, third],
        },
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": config.vision_layers,
        "hidden_size": config.vision_width,
        "intermediate_size": config.vision_ffn,
        "num_heads": config.vision_heads,
        "patch_size": config.patch,
        "temporal_patch_size": 1,
        "spatial_merge_size": MERGE,
        "window_size": config.image_side,
        "out_hidden_size": config.width,
        "fullatt_block_indexes": list(range(config.vision_layers)),
    }
    ids = dict(zip(CONTROL, tokenizer.convert_tokens_to_ids(list(CONTROL)), strict=True))  # type: ignore[arg-type]
    full = Qwen2_5_VLConfig(  # type: ignore[call-arg]
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|im_start|>"],
        vision_end_token_id=ids["<|im_end|>"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2_5_VLForConditionalGeneration._from_config(  # type: ignore[no-untyped-call]
        full, attn_implementation="eager"
    )
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    return model
