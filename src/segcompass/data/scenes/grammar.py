"""The small grammar of the oracle's thoughts: how things are named, listed, concluded and found.

name     colour category cell                      red mug b4
entry    [size] [texture] colour category cell     small striped blue book c7
pick     I find NAME, NAME. | Of these NAME. | Of these nothing.
closing  So the answer is A. | So the answer is A, B and C. | So nothing matches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from segcompass.data.scenes.catalog import CATEGORIES, COLOURS, Scene

NOTHING = "So nothing matches."
REACH = 1  # map cells (Chebyshev) that a name's place may be off
_NAME = rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(CATEGORIES)}) [a-h][1-8]"
_CLOSING = re.compile(rf"So the answer is ({_NAME}(?:(?:, {_NAME})* and {_NAME})?)\.")
_START = re.compile(r"(?<!\S)So\b")


class Named(Protocol):
    """What can be named: a ``Thing`` of a scene or an annotated ``NamedObject``."""

    @property
    def category(self) -> str: ...
    @property
    def colour(self) -> str: ...
    @property
    def size(self) -> str: ...
    @property
    def texture(self) -> str: ...
    @property
    def cell(self) -> str: ...


def name(thing: Named) -> str:
    """Name a thing shortly, "red mug b4"."""
    return f"{thing.colour} {thing.category} {thing.cell}"


def entry(thing: Named) -> str:
    """Name a thing fully, "small striped blue book c7"; medium and plain go without saying."""
    size = "" if thing.size == "medium" else f"{thing.size} "
    texture = "" if thing.texture == "plain" else f"{thing.texture} "
    return f"{size}{texture}{name(thing)}"


def enumerate_words(words: Sequence[str]) -> str:
    """Join words as "A", "A and B" or "A, B and C"."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def describe(scene: Scene) -> str:
    """List everything in the picture in reading order: the caption, and a thought's second part."""
    return f"I see {', '.join(entry(thing) for thing in scene.things)}."


def pick(things: Iterable[Named], *, again: bool = False) -> str:
    """Say what fits, "I find red mug b4, blue mug c5."; with ``again``, of those named last.

    One condition at a time: a name is found in the listing by what it must match, while several
    conditions at once, or a yes or no for every thing, are far harder to learn.
    """
    names = ", ".join(name(thing) for thing in things)
    return f"{'Of these' if again else 'I find'} {names or 'nothing'}."


def closing(things: Iterable[Named]) -> str:
    """Conclude with the things in the order given; no things is an answer too."""
    names = [name(thing) for thing in things]
    return f"So the answer is {enumerate_words(names)}." if names else NOTHING


def resolve(thought: str, objects: Sequence[Named]) -> tuple[int, ...] | None:
    """Find the objects that a thought's last closing sentence names.

    A name fits the nearest object of its colour and category, at most one map cell away.

    Args:
        thought: any text; only what follows its last "So" counts.
        objects: everything in the picture, in any order.

    Returns:
        Sorted indices into ``objects``; ``()`` for "So nothing matches."; ``None`` where there is
        no well-formed closing sentence, or a name fits no object, several equally well, or the
        object of another name.
    """
    starts = [match.start() for match in _START.finditer(thought)]
    if not starts:
        return None
    sentence = thought[starts[-1] :]
    if sentence.startswith(NOTHING):
        return ()
    parsed = _CLOSING.match(sentence)
    if parsed is None:
        return None
    found = [_nearest(words, objects) for words in re.split(", | and ", parsed.group(1))]
    indices = sorted(index for index in found if index is not None)
    if len(set(indices)) < len(found):
        return None
    return tuple(indices)


def _nearest(words: str, objects: Sequence[Named]) -> int | None:
    """The one object that a name fits best."""
    colour, category, cell = words.split(" ")
    fits = sorted(
        (distance(cell, thing.cell), index)
        for index, thing in enumerate(objects)
        if (thing.colour, thing.category) == (colour, category)
    )
    if not fits or fits[0][0] > REACH:
        return None
    if len(fits) > 1 and fits[0][0] == fits[1][0]:
        return None
    return fits[0][1]


def distance(one: str, other: str) -> int:
    """How many map cells two places lie apart (Chebyshev)."""
    return max(abs(ord(one[0]) - ord(other[0])), abs(int(one[1]) - int(other[1])))
