"""Prompt templates of published checkpoints: the model folder's own chat around a question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from segcompass.io.errors import CheckpointError
from segcompass.reasoning.prompts import IMAGE_SLOT, qwen_template


def chat_template(folder: Path, question: str) -> str:
    """How a checkpoint wants to be asked.

    Args:
        folder: A policy's folder. The chat template of its tokenizer is used if there is one
            (transformers renders it in Jinja's sandbox), else Qwen's.
        question: What the person says, with ``{instruction}`` in it.

    Returns:
        Control text with ``{image}`` and ``{instruction}``, for `PromptConfig.template`.

    Raises:
        CheckpointError: If the folder has no tokenizer, or its template cannot be rendered.
    """
    said: Any = [{"type": "image"}, {"type": "text", "text": question}]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if tokenizer.chat_template is None:
            return qwen_template(question)
        image = AutoConfig.from_pretrained(folder, trust_remote_code=False).image_token_id
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": said}], tokenize=False, add_generation_prompt=True
        )
        return str(text).replace(str(tokenizer.convert_ids_to_tokens(image)), IMAGE_SLOT)
    except Exception as error:
        raise CheckpointError(
            f"{folder} has no usable chat template ({type(error).__name__}: {error}); give a "
            "prompt template with {image} and {instruction} yourself"
        ) from error
