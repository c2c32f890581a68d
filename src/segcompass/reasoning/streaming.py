"""An answer while it is written."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from segcompass.reasoning.prompts import Prompt

OnText = Callable[[list[str]], None]


class TextStream(BaseStreamer):
    """Hands on, after every token, what each row of a batch says so far.

    Args:
        prompt: Decodes the tokens, control tokens included.
        on_text: Takes one text per row; end-of-text and what follows are left out.
    """

    def __init__(self, prompt: Prompt, on_text: OnText) -> None:
        self._prompt, self._on_text = prompt, on_text
        self._written: list[list[int]] | None = None  # None until the prompts have gone by

    def put(self, value: Tensor) -> None:
        """Take the prompts, on the first call, and then the next token of every row."""
        if self._written is None:
            self._written = [[] for _ in range(len(value))]
            return
        for row, token in zip(self._written, value.flatten().tolist(), strict=True):
            row.append(token)
        self._on_text([self._text(row) for row in self._written])

    def end(self) -> None:
        """Nothing is held back that could be left over."""

    def _text(self, ids: list[int]) -> str:
        eos = self._prompt.eos_token_id
        text = self._prompt.decode(ids[: ids.index(eos)] if eos in ids else ids)
        return text.rstrip("\ufffd")  # a character whose last bytes are still to come
