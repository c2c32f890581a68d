"""Text to tokens and back, for any Hugging Face tokenizer: as data, or as control text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

_BLANKS = " \t\r\nĠĊĉč▁"  # white space as text and as tokenizers write it
_ANCHOR = "0"  # no tokenizer of either family joins a digit with what follows it


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...  # id -> AddedToken

    def get_vocab(self) -> dict[str, int]: ...

    def encode(
        self, text: str, *, add_special_tokens: bool = ..., split_special_tokens: bool | None = ...
    ) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


class TextCodec:
    """A tokenizer's ways of writing, kept apart by what the text may do.

    Args:
        tokenizer: With all its added tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.control_ids = sorted(added)
        plain = sorted((t.content for t in added.values() if not t.special), key=len, reverse=True)
        self._unsplit = re.compile("|".join(map(re.escape, plain)) or r"(?!)")

    def encode_data(self, text: str) -> list[int]:
        """Tokenise text in which nothing is control, whatever it looks like.

        Raises:
            ValueError: If it is no valid Unicode text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds half a character at position {error.start} "
                f"({text[error.start : error.end]!r}); pass valid Unicode"
            ) from None
        # Tokenizers split special tokens on demand; other added tokens have to be cut in two.
        cuts = [0, *(m.start() + 1 for m in self._unsplit.finditer(text)), len(text)]
        pieces = [text[a:b] for a, b in pairwise(cuts)]
        return [
            token
            for piece in pieces
            for token in self.tokenizer.encode(
                piece, add_special_tokens=False, split_special_tokens=True
            )
        ]

    def encode_inner(self, text: str) -> list[int]:
        """Data as it is tokenised behind a digit: without the blank that some put in front."""
        return self.encode_data(_ANCHOR + text)[len(self.encode_data(_ANCHOR)) :]

    def encode_control(self, text: str) -> list[int]:
        """Tokenise text whose control tokens are meant as such."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens to text, control tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def vocabulary(self) -> int:
        """Ids from here on mean nothing; models may have spare rows."""
        return 1 + max(self.tokenizer.get_vocab().values())

    @cached_property
    def mark_endings(self) -> list[tuple[int, str]]:
        """Tokens that can complete a think mark, with their text: all that hold a ``>``."""
        texts = {i: t.replace("<0x3E>", ">") for t, i in self.tokenizer.get_vocab().items()}
        return [(i, text.rstrip(_BLANKS)) for i, text in texts.items() if ">" in text]
