"""Load and save the policy as a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from segcompass.io.errors import CheckpointError
from segcompass.reasoning.backbones import FAMILIES
from segcompass.reasoning.from_scratch import (
    ScratchConfig,
    build_image_processor,
    build_model,
    build_tokenizer,
)
from segcompass.reasoning.policy import Policy, PolicyConfig

_IMAGE_PROCESSORS: dict[str, Any] = {
    "qwen2_5_vl": Qwen2VLImageProcessorPil,
    "llava": CLIPImageProcessorPil,
}


def load_policy(
    source: str | Path,
    config: PolicyConfig,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Policy:
    """Load a policy from a folder or a hub id; adds the concentration tokens if it lacks them.

    Raises:
        CheckpointError: naming the folder, what is wrong with it, and the way out.
    """
    # Never run code of a checkpoint, and never read a pickle.
    options: dict[str, Any] = {"trust_remote_code": False}
    options |= {"revision": revision} if revision else {}
    try:
        family = AutoConfig.from_pretrained(source, **options).model_type
        if family not in FAMILIES:
            raise CheckpointError(
                f"{source} holds a {family!r} model; supported policies: {', '.join(FAMILIES)}"
            )
        model_class, backbone_class = FAMILIES[family]
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        processor = _IMAGE_PROCESSORS[family].from_pretrained(source, **options)
        loaded: Any = model_class.from_pretrained(
            source, dtype=dtype, output_loading_info=True, use_safetensors=True, **options
        )
        model, report = loaded
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{source} is no usable policy folder ({type(error).__name__}: {error}); "
            "it needs config.json, safetensors weights, a tokenizer and an image processor"
        ) from error
    missing = {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]}
    if missing:
        raise CheckpointError(
            f"{source}: the weights do not fit the config, first difference "
            f"{sorted(map(str, missing))[0]}; get a complete copy of the checkpoint"
        )
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise CheckpointError(f"{source}: the tokenizer has no padding or no end-of-text token")
    # The checkpoint's own habits (beams, penalties, …) would change how answers are decoded.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    _add_concentration_tokens(model, tokenizer, config.prompt.tokens)
    try:
        return Policy(
            backbone_class(model, processor, config.pad_to_square, config.stretch_to),
            tokenizer,
            config,
        ).eval()
    except ValueError as error:
        raise CheckpointError(f"{source} cannot be used as configured: {error}") from error


def new_policy(scratch: ScratchConfig, config: PolicyConfig, texts: list[str], seed: int) -> Policy:
    """A randomly initialised policy whose tokenizer knows the words of ``texts``."""
    tokenizer = build_tokenizer(texts, scratch.vocabulary, len(config.prompt.tokens))
    model = build_model(scratch, tokenizer, seed)
    family = FAMILIES["qwen2_5_vl"][1]
    processor = build_image_processor(scratch)
    backbone = family(model, processor, config.pad_to_square, config.stretch_to)
    return Policy(backbone, tokenizer, config)


def save_policy(
    policy: Policy,
    folder: Path,
    dtype: torch.dtype | None = None,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write model, tokenizer and image processor, openable by transformers alone.

    ``state`` stands in for the model's weights, where this process has only a part of them.
    """
    state = policy.model.state_dict() if state is None else state
    if dtype is not None:
        # Tied parameters must stay one tensor, or they would be written twice.
        cast = {v.data_ptr(): v.to(dtype) for v in state.values() if v.is_floating_point()}
        state = {name: cast.get(v.data_ptr(), v) for name, v in state.items()}
    policy.model.save_pretrained(folder, state_dict=state)
    policy.tokenizer.save_pretrained(folder)
    policy.backbone.image_processor.save_pretrained(folder)


def _add_concentration_tokens(model: Any, tokenizer: Any, tokens: list[str]) -> None:
    """Give an instruct model its K new tokens; row k starts as the mean of the words "object k".

    A row like no other would never be written, and would read as noise.
    """
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    if not new:
        return
    tokenizer.add_tokens(new, special_tokens=True)
    embeddings = model.get_input_embeddings().weight
    if len(tokenizer) > len(embeddings):  # some models have spare rows
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids(new)
    tables = {
        id(m.weight): m.weight
        for m in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    with torch.no_grad():
        for table in tables.values():  # one where input and output are tied
            for token, row in zip(new, ids, strict=True):
                number = tokens.index(token) + 1
                words = tokenizer.encode(f" object {number}", add_special_tokens=False)
                table[row] = table[words].float().mean(0).to(table.dtype)
