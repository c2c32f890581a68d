"""Put what was measured on tokens onto the words that a person reads.

A policy's tokens are pieces of words, sometimes pieces of characters. The report shows the text as
it is and shades whole words, so tokens are located in the text and each word takes the strongest
reading of its pieces.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from segcompass.io.readings import ConceptWeight, TokenActivation

SLACK = 16  # characters by which a token may lie beyond where it was expected

# Punctuation stands apart from words; scripts without spaces are read character by character.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_STOPS = ".,;:!?()…。、，！？"
_UNIT = re.compile(rf"[{_STOPS}]+|[{_UNSPACED}]|[^\s{_STOPS}{_UNSPACED}]+")


class Segment(NamedTuple):
    """A piece of text to show: a word with its number and shade, or what lies between words."""

    text: str
    word: int | None = None
    shade: float = 0.0  # activation relative to the strongest word of the text, in [0, 1]


@dataclass
class Words:
    """The words of one card, numbered through all its texts."""

    concepts: list[tuple[ConceptWeight, ...]] = field(default_factory=list)  # strongest first
    of_token: dict[int, int] = field(default_factory=dict)  # position in the sequence -> word


def align_words(text: str, readings: Sequence[TokenActivation], words: Words) -> list[Segment]:
    """Split a text into words, give each the readings of its tokens, and enter it in ``words``.

    Args:
        text: the text as it is shown.
        readings: its tokens in order, with their activations.
        words: the card's words so far; extended in place.

    Returns:
        Segments that together are exactly ``text``.
    """
    units = list(_UNIT.finditer(text))
    members: list[list[TokenActivation]] = [[] for _ in units]
    starts = [unit.start() for unit in units]
    for reading, place in zip(readings, locate(text, [r.text for r in readings]), strict=True):
        unit = bisect_right(starts, place) - 1
        if unit + 1 < len(units) and (unit < 0 or place >= units[unit].end()):
            unit += 1  # a token that begins between two words belongs to the second
        if units:
            members[unit].append(reading)
    totals = [max((r.total for r in pieces), default=0.0) for pieces in members]
    strongest = max(totals, default=0.0) or 1.0
    segments, end = [], 0
    for match, pieces, total in zip(units, members, totals, strict=True):
        if match.start() > end:
            segments.append(Segment(text[end : match.start()]))
        words.of_token |= {r.position: len(words.concepts) for r in pieces}
        segments.append(Segment(match[0], len(words.concepts), total / strongest))
        words.concepts.append(_merge(pieces))
        end = match.end()
    return [*segments, Segment(text[end:])] if end < len(text) else segments


def locate(text: str, tokens: Sequence[str]) -> list[int]:
    """For every token the position in ``text`` where it begins.

    Tokens that hold part of a character cannot be found; they are placed where the token before
    them ended.
    """
    places, cursor, unplaced = [], 0, 0
    for token in tokens:
        piece = token.replace("Ġ", " ").replace("▁", " ").strip()
        reach = cursor + unplaced + len(piece) + SLACK
        found = text.find(piece, cursor, reach) if piece and "\ufffd" not in piece else -1
        places.append(cursor if found < 0 else found)
        if found >= 0:
            cursor, unplaced = found + len(piece), 0
        else:
            unplaced += len(token)
    return places


def _merge(pieces: Sequence[TokenActivation]) -> tuple[ConceptWeight, ...]:
    """The concepts of a word: for each the largest activation on any of its pieces."""
    largest: dict[int, float] = {}
    for piece in pieces:
        for concept, weight in piece.concepts:
            largest[concept] = max(weight, largest.get(concept, 0.0))
    ordered = sorted(largest.items(), key=lambda item: (-item[1], item[0]))
    kept = max((len(piece.concepts) for piece in pieces), default=0)
    return tuple(ConceptWeight(*item) for item in ordered[:kept])
