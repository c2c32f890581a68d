"""Whole words from a policy's tokens, which are often pieces of words."""

from __future__ import annotations

from typing import NamedTuple

from segcompass.types import Prediction, TokenKind

SPOKEN = (TokenKind.INSTRUCTION, TokenKind.THOUGHT)
_BLANKS = str.maketrans({"Ġ": " ", "▁": " "})  # how tokenizers write a leading blank


class Word(NamedTuple):
    """A word and the tokens that spell it."""

    text: str  # lower case, no blanks around
    tokens: tuple[int, ...]  # positions in the sequence


def words(prediction: Prediction) -> list[Word]:
    """The words of instruction and thought in order.

    A token begins a word if it starts with a blank, if it or the one before ends in something
    other than a letter or digit, or if the kind of token changes.
    """
    found: list[tuple[str, list[int]]] = []
    before = None
    for position, (token, kind) in enumerate(
        zip(prediction.tokens, prediction.token_kinds, strict=True)
    ):
        text = token.translate(_BLANKS)
        if kind not in SPOKEN:
            before = None
            continue
        joined = before == kind and text[:1].isalnum() and found[-1][0][-1:].isalnum()
        if joined:
            found[-1] = (found[-1][0] + text, [*found[-1][1], position])
        else:
            found.append((text, [position]))
        before = kind
    return [Word(text.strip().lower(), tuple(tokens)) for text, tokens in found if text.strip()]
